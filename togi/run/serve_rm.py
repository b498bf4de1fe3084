"""``togi serve-rm``: a reward model or a reward function behind HTTP.

A query is scored as it is: BOS is added if the tokenizer wants it, an end token is scored only if the text has it, padding at
the ends is dropped, and a query that is too long is refused. So a served model gives the scores that ``--reward_pretrain`` gives.
"""

import asyncio
import math
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from togi.config.model_facts import position_limit
from togi.config.tools import ServeRMConfig
from togi.data.chat import Tokenizer, adds_bos, check_vocabulary, encode, load_tokenizer
from togi.errors import ConfigError, DataError
from togi.model.loading import known_tokens
from togi.obs.way_out import way_out
from togi.reward.function import CallLimits, FunctionReward
from togi.reward.server import PATH, Batcher, RewardServer, ScoreCall, ServerLimits
from togi.reward.wire import Answer, Call, Complaint
from togi.run.loading import RewardModel


def serve(config: ServeRMConfig, token: str, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer pending requests and end. Raises UserError."""
    asyncio.run(_serve(config, token, announce))


async def _serve(config: ServeRMConfig, token: str, announce: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    limits = ServerLimits(int(config.max_body_mb * 1e6), config.max_items, config.max_queue, token)
    async with source(config) as score:
        server = RewardServer(score, limits)
        try:
            port = await server.start(config.host, config.port)
        except OSError as error:
            raise ConfigError(
                f"--host {config.host} --port {config.port} cannot be listened on ({error.strerror}): take another port."
            ) from None
        announce(f"reward server: http://{config.host}:{port}{PATH}")
        await stop.wait()
        await server.close()
    announce("reward server: ended")


@asynccontextmanager
async def source(config: ServeRMConfig) -> AsyncIterator[ScoreCall]:
    """The scoring function of the server; it is closed at the end."""
    # A reward function runs in worker processes of its own.
    if config.reward_func:
        limits = CallLimits(config.reward_workers, config.reward_timeout)
        function = FunctionReward.from_file(config.reward_func, limits)
        try:
            yield function.answer
        finally:
            with way_out("closing the reward"):
                await function.close()
        return
    # A model runs in this process; requests that wait together share a forward pass.
    model = ServedModel(config)
    batcher = Batcher(model.forward, config.max_tokens_per_gpu, config.batch_size)

    async def score(call: Call) -> Answer:
        scores = await batcher.score(await asyncio.to_thread(model.tokens_of, call["queries"]))
        bad = next((index for index, value in enumerate(scores) if not math.isfinite(value)), None)
        if bad is not None:
            raise Complaint(f"model gave {scores[bad]} for query {bad}", "check its weights and its number format")
        return {"rewards": [*scores]}

    try:
        yield score
    finally:
        with way_out("ending the batches"):
            batcher.close()


class ServedModel:
    """A reward model in this process. Raises ModelError or DataError for a folder that holds none."""

    def __init__(self, config: ServeRMConfig) -> None:
        path = config.reward_pretrain
        self._max_len = config.max_len
        self._budget = config.max_tokens_per_gpu
        self._tokenizer = load_tokenizer(path, chat_template=None, trust_remote_code=config.trust_remote_code)
        self._known = known_tokens(path, config.trust_remote_code)
        check_vocabulary(self._tokenizer, path, self._known)
        self._model = RewardModel(path, config, in_4bit=config.load_in_4bit)
        self._positions = position_limit(self._model.config.to_dict())

    def tokens_of(self, queries: Sequence[str]) -> list[list[int]]:
        """Token ids of each query. Raises Complaint if they cannot be scored."""
        try:
            sequences = query_tokens(queries, self._tokenizer)
        except DataError as error:
            raise Complaint(f"model cannot read a query: {error}", "send a text with one BOS token or none") from None
        # One query at fault refuses the whole request, so that scores stay aligned with queries.
        for index, tokens in enumerate(sequences):
            if not tokens:
                raise Complaint(f"model has nothing to score: query {index} is empty", "send a text")
            if len(tokens) > self._max_len:
                what = f"model is not asked about query {index}: it has {len(tokens)} tokens, more than --max_len {self._max_len}"
                raise Complaint(what, "shorten it, or start the server with a larger --max_len")
            if self._positions is not None and len(tokens) > self._positions:
                what = f"model cannot read query {index}: it has {len(tokens)} tokens, and the model {self._positions} positions"
                raise Complaint(what, "shorten it")
            if max(tokens) >= self._known:
                unknown = self._tokenizer.convert_ids_to_tokens(max(tokens))
                what = (
                    f"model cannot read query {index}: {unknown!r} has no row among the {self._known} of its embedding"
                )
                raise Complaint(what, "leave it out, or serve the model with its own tokenizer")
        return sequences

    def forward(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One score per sequence, packed without padding."""
        return [self._model.standardize(score) for score in self._model.scores(sequences, self._budget)]


def query_tokens(queries: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of queries. Special tokens are written as text, padding at the ends is dropped, and BOS is added if the
    tokenizer adds it.

    Clients that decode padded batches send padding along. If padding and end token are the same, the first one behind the text is
    the end token. Raises DataError.
    """
    pad, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    wants_bos = adds_bos(tokenizer)
    result = []
    for tokens in encode(queries, tokenizer, add_special_tokens=False):
        start, end = 0, len(tokens)
        while start < end and tokens[start] == pad:
            start += 1
        while start < end and tokens[end - 1] == pad:
            end -= 1
        if pad == eos and end < len(tokens):
            end += 1
        needs_bos = wants_bos and tokens[start:end][:1] not in ([bos], [])
        result.append([bos] * needs_bos + tokens[start:end])
    return result
