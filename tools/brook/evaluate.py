"""Measures an exported model on held-out examples, answered greedily through the chat template.

Run: python -m brook.evaluate MODEL_DIR [--count 200] [--draft DRAFT_DIR] [--penstock]
Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from .chat import END, EOS
from .data import special_id
from .example import Example
from .model import Llama, load_hf
from .render import Chat, wire
from .tasks import TASKS, held_out

MAX_TOKENS = 256
Answer = Callable[[Sequence[Example]], list[str]]


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion."""
    z = 1.959964
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


@torch.inference_mode()
def generate(
    model: Llama, prompts: Sequence[list[int]], stops: set[int], limit: int
) -> list[list[int]]:
    """Greedy continuations of prompts that all have the same length."""
    hidden, cache = model.extend(torch.tensor(prompts), [])
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(min(limit, model.config.max_len - len(prompts[0]))):
        chosen = model.logits(hidden[:, -1]).argmax(-1)
        for index, token in enumerate(chosen.tolist()):
            done[index] = done[index] or token in stops
            if not done[index]:
                out[index].append(token)
        if all(done):
            break
        hidden, cache = model.extend(chosen[:, None], cache)
    return out


def own_answers(folder: Path) -> Answer:
    """Answers by the plain torch model of this folder."""
    model, chat = load_hf(folder), Chat(folder)
    stops = {special_id(chat.tokenizer, token) for token in (END, EOS)}

    def answer(examples: Sequence[Example]) -> list[str]:
        prompts = [chat.ids(wire(example), list(example.tools)) for example in examples]
        texts = [""] * len(prompts)
        for length in {len(prompt) for prompt in prompts}:
            batch = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            made = generate(model, [prompts[i] for i in batch], stops, MAX_TOKENS)
            for i, ids in zip(batch, made, strict=True):
                texts[i] = chat.tokenizer.decode(ids, skip_special_tokens=False)
        return texts

    return answer


def penstock_answers(folder: Path) -> Answer:
    """Answers by penstock's own engine."""
    from penstock import LLM, SamplingParams

    engine = LLM(str(folder))
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

    def answer(examples: Sequence[Example]) -> list[str]:
        texts = []
        for example in examples:
            tools = list(example.tools) or None
            output = engine.chat([wire(example)], params, tools=tools, progress=False)[0]
            texts.append(output.outputs[0].text)
        return texts

    return answer


def score(answer: Answer, count: int, seed: int, show: int) -> dict[str, tuple[int, int]]:
    """Right answers and examples of every task."""
    result: dict[str, tuple[int, int]] = {}
    for name in TASKS:
        examples = held_out(name, count, seed)
        texts = answer(examples)
        wrong = [pair for pair in zip(examples, texts, strict=True) if not pair[0].check(pair[1])]
        for example, text in wrong[:show]:
            print(f"  {example.messages[-1].content!r} -> {text!r}, not {example.answer_text!r}")
        result[name] = (count - len(wrong), count)
        print(line(name, *result[name]), flush=True)
    return result


def line(name: str, right: int, count: int) -> str:
    """One row of the table."""
    low, high = wilson(right, count)
    return f"| {name:<15} | {right / count:6.1%} | {count:5} | {low:6.1%} to {high:6.1%} |"


def by_group(result: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The sums over the groups of tasks."""
    groups: dict[str, tuple[int, int]] = {}
    for name, (right, count) in result.items():
        before = groups.get(TASKS[name].group, (0, 0))
        groups[TASKS[name].group] = (before[0] + right, before[1] + count)
    return groups


@torch.inference_mode()
def bits_per_token(folder: Path, count: int, seed: int) -> float:
    """Mean cross entropy of the held-out answers, in bits."""
    model, chat = load_hf(folder), Chat(folder)
    total, tokens = 0.0, 0
    for name in TASKS:
        for example in held_out(name, count, seed):
            prompt = chat.ids(wire(example), list(example.tools))
            ids = prompt + chat.tokenizer.encode(example.answer_text + END).ids
            logits = model.logits(model.hidden(torch.tensor([ids[:-1]])))[0, len(prompt) - 1 :]
            target = torch.tensor(ids[len(prompt) :])
            total += float(F.cross_entropy(logits, target, reduction="sum"))
            tokens += len(target)
    return total / tokens / math.log(2)


@torch.inference_mode()
def acceptance(folder: Path, draft_folder: Path, count: int, seed: int) -> dict[str, float]:
    """Per group: how often the draft's greedy token is brook's, along brook's answers."""
    model, draft, chat = load_hf(folder), load_hf(draft_folder), Chat(folder)
    answer = own_answers(folder)
    hits: dict[str, list[int]] = {}
    for name, task in TASKS.items():
        examples = held_out(name, count, seed)
        for example, text in zip(examples, answer(examples), strict=True):
            prompt = chat.ids(wire(example), list(example.tools))
            made = chat.tokenizer.encode(text + END).ids
            ids = torch.tensor([(prompt + made)[:-1]])
            first = len(prompt) - 1
            best = [m.logits(m.hidden(ids))[0, first:].argmax(-1) for m in (model, draft)]
            group = hits.setdefault(task.group, [0, 0])
            group[0] += int((best[0] == best[1]).sum())
            group[1] += len(made)
    hits["all"] = [sum(h[i] for h in hits.values()) for i in (0, 1)]
    return {name: round(right / n, 4) for name, (right, n) in hits.items()}


def report(result: dict[str, tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Scores with intervals, ready for JSON."""
    out = {}
    for name, (right, count) in result.items():
        low, high = wilson(right, count)
        out[name] = {
            "score": round(right / count, 4),
            "n": count,
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return out


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=200, help="examples a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print a task")
    parser.add_argument("--draft", type=Path, help="also measure how often its guesses are right")
    parser.add_argument("--penstock", action="store_true", help="answer with penstock's engine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    answer = (penstock_answers if options.penstock else own_answers)(options.model)
    result = score(answer, options.count, options.seed, options.show)
    groups = by_group(result)
    print("\n".join(line(name, *pair) for name, pair in groups.items()))
    final = {"tasks": report(result), "groups": report(groups), "seed": options.seed}
    final["bits_per_answer_token"] = round(bits_per_token(options.model, 20, options.seed), 4)
    if options.draft:
        final["draft_acceptance"] = acceptance(options.model, options.draft, 20, options.seed)
    print(json.dumps(final))


if __name__ == "__main__":
    main()
