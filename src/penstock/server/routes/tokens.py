"""POST /tokenize, POST /detokenize and GET /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from penstock.errors import InvalidField
from penstock.protocol.native import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from penstock.server.calls import Call
from penstock.server.prompts import chat_token_ids
from penstock.server.routes.generation import WatchedEndpoint, json_response, read
from penstock.server.service import Service, service_of


async def _tokenize(service: Service, call: Call, body: bytes) -> Response:
    """The token ids of a text or of a conversation."""
    asked = await read(service, TokenizeRequest, body)
    service.check_model(asked.model)
    _check_form(asked)
    token_ids = await service.workers.run(lambda: _token_ids(asked, service))
    spelt = None
    if asked.return_token_strs:
        spelt = [service.tokenizer.token_str(token_id) or "" for token_id in token_ids]
    return json_response(
        TokenizeResponse(
            count=len(token_ids),
            max_model_len=service.client.info.max_model_len,
            tokens=token_ids,
            token_strs=spelt,
        )
    )


tokenize = WatchedEndpoint(_tokenize)


def _check_form(asked: TokenizeRequest) -> None:
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidField("Give either `prompt` or `messages`.", field="prompt")
    if asked.prompt is None:
        return
    for name in ("add_generation_prompt", "chat_template_kwargs"):
        if getattr(asked, name) is not None:
            raise InvalidField(f"`{name}` belongs to `messages`.", field=name)


def _token_ids(asked: TokenizeRequest, service: Service) -> list[int]:
    if asked.prompt is None:
        return chat_token_ids(asked, service)
    return service.tokenizer.encode(
        asked.prompt, add_special_tokens=asked.add_special_tokens is not False
    )


async def _detokenize(service: Service, call: Call, body: bytes) -> Response:
    """The text of token ids, special tokens included."""
    asked = await read(service, DetokenizeRequest, body)
    service.check_model(asked.model)
    vocab_size = service.client.info.vocab_size
    for token_id in (min(asked.tokens, default=0), max(asked.tokens, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidField(
                f"`tokens` holds `{token_id}`; the vocabulary has `{vocab_size}`.", field="tokens"
            )
    text = await service.workers.run(
        lambda: service.tokenizer.decode(asked.tokens, skip_special_tokens=False)
    )
    return json_response(DetokenizeResponse(text))


detokenize = WatchedEndpoint(_detokenize)


async def tokenizer_info(request: Request) -> Response:
    """What lm-evaluation-harness wants to know of the tokenizer."""
    service = service_of(request)
    tokenizer = service.tokenizer
    return json_response(
        TokenizerInfo(
            tokenizer_class="penstock",
            vocab_size=service.client.info.vocab_size,
            model_max_length=service.client.info.max_model_len,
            bos_token=tokenizer.special_tokens.get("bos_token"),
            eos_token=tokenizer.special_tokens.get("eos_token"),
            pad_token=tokenizer.special_tokens.get("pad_token"),
            chat_template=tokenizer.chat_templates.get("default"),
        )
    )
