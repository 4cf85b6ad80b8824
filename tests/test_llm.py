"""The offline API with the model that ships: text in, text out."""

from __future__ import annotations

import pytest

import penstock
from penstock import LLM, SamplingParams
from penstock.errors import ConfigError, ContextTooLong, InvalidField, RequestError
from penstock.llm import Job

GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUESTIONS = [
    "What is 17 + 25?",
    'Reverse "river".',
    "Hello!",
    "Tell me a story about a fox.",
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("brook", num_threads=1, max_num_seqs=8, kv_cache_memory_bytes=32 * 2**20)


def chats(questions: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question in questions]


def test_public_names() -> None:
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = penstock.nothing


def test_outputs_keep_the_order_of_prompts(llm: LLM) -> None:
    together = llm.chat(chats(QUESTIONS * 4), GREEDY)
    alone = [llm.chat(chat, GREEDY)[0] for chat in chats(QUESTIONS)]
    assert [o.outputs[0].text for o in together] == [o.outputs[0].text for o in alone] * 4
    assert all(output.finished for output in together)
    assert len({output.outputs[0].text for output in together}) > 1


def test_stream_equals_whole(llm: LLM) -> None:
    for chat in chats(QUESTIONS):
        whole = llm.chat(chat, GREEDY)[0].outputs[0].text
        assert "".join(llm.stream_chat(chat, GREEDY)) == whole


def test_closing_a_stream_frees_the_engine(llm: LLM) -> None:
    stream = llm.stream_chat(chats(QUESTIONS)[3], GREEDY)
    assert next(stream)
    assert llm.core.has_work
    stream.close()
    assert not llm.core.has_work
    llm.core.scheduler.check()


def test_two_iterators_at_once(llm: LLM) -> None:
    """An answer that is being streamed, and others asked for meanwhile, are as if alone."""
    story, question = chats(QUESTIONS)[3], chats(QUESTIONS)[0]
    alone = [llm.chat(chat, GREEDY)[0].outputs[0].text for chat in (story, question)]
    stream = llm.stream_chat(story, GREEDY)
    first = next(stream)
    assert llm.chat(question, GREEDY)[0].outputs[0].text == alone[1]
    other = llm.stream_chat(story, GREEDY)
    assert "".join([next(other), *other]) == alone[0]
    assert first + "".join(stream) == alone[0]
    assert not llm.core.has_work


def test_n_answers_differ_and_are_reproducible(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=7, temperature=1.5, max_tokens=16)
    first, second = (llm.chat(chats(QUESTIONS)[3], params)[0] for _ in range(2))
    texts = [answer.text for answer in first.outputs]
    assert texts == [answer.text for answer in second.outputs]
    assert [answer.index for answer in first.outputs] == [0, 1, 2, 3]
    assert len(set(texts)) > 1


def test_stop_string_ends_text_tokens_and_engine(llm: LLM) -> None:
    plain = llm.generate("the cat and the dog", SamplingParams(temperature=0, max_tokens=40))[0]
    text = plain.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    params = SamplingParams(temperature=0, max_tokens=40, stop=(stop,), logprobs=1)
    answer = llm.generate("the cat and the dog", params)[0].outputs[0]
    assert answer.text == text[: text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.token_ids == plain.outputs[0].token_ids[: len(answer.token_ids)]
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids) < 40
    assert not llm.core.has_work


def test_token_ids_and_logprobs(llm: LLM) -> None:
    ids = llm.tokenizer.encode("the cat and the dog")
    params = SamplingParams(
        temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=0, ignore_eos=True
    )
    by_ids, by_text = llm.generate([ids, "the cat and the dog"], params)
    assert by_ids.outputs[0].token_ids == by_text.outputs[0].token_ids
    assert by_ids.prompt is None
    assert by_ids.prompt_logprobs is not None
    assert by_ids.prompt_logprobs[0] is None
    assert len(by_ids.prompt_logprobs) == len(ids)
    logprobs = by_ids.outputs[0].logprobs
    assert logprobs is not None
    assert [entry.rank for entry in logprobs] == [1, 1, 1]
    assert all(len(entry.top) == 2 for entry in logprobs)


def test_a_wrong_prompt_is_told_before_anything_is_computed(llm: LLM) -> None:
    steps = llm.core.stats.num_steps
    too_long = [1] * (llm.core.info.max_model_len + 1)
    with pytest.raises(ContextTooLong):
        llm.generate(["fine", too_long], GREEDY)
    with pytest.raises(InvalidField, match="vocabulary"):
        llm.generate(["fine", [10**6]], GREEDY)
    with pytest.raises(InvalidField, match="`2` entries for `1` prompts"):
        llm.generate("fine", [GREEDY, GREEDY])
    assert llm.core.stats.num_steps == steps
    assert not llm.core.has_work


def test_run_takes_jobs_lazily_and_hands_errors_over(llm: LLM) -> None:
    taken = 0
    refused: list[tuple[Job, RequestError]] = []

    def jobs() -> object:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield Job(None, [] if number == 3 else [1, 2, 3], SamplingParams(max_tokens=2))

    results = llm.run(jobs(), on_error=lambda *pair: refused.append(pair))  # type: ignore[arg-type]
    next(results)
    assert taken < 100
    assert len(list(results)) == 98
    assert len(refused) == 1
    assert refused[0][1].field == "prompt_token_ids"


def test_wrong_options_are_sentences() -> None:
    with pytest.raises(ConfigError, match="neither a directory nor a built-in model"):
        LLM("no-such-model")
    with pytest.raises(ConfigError, match="bogus"):
        LLM("brook", bogus=1)


def test_special_tokens_in_a_message_stay_text(llm: LLM) -> None:
    ids = llm.prepare_chat([{"role": "user", "content": "<|end|>"}]).token_ids
    plain = llm.prepare_chat([{"role": "user", "content": ""}]).token_ids
    end = llm.tokenizer.token_id("<|end|>")
    assert end is not None
    assert ids.count(end) == plain.count(end)
