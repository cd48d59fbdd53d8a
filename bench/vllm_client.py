"""vLLM's own benchmark client (`vllm bench serve`): short answers of equal length, for which each request counts."""

import asyncio
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.support.tiny import MODEL

TOKENS = 64
"""Tokens of each prompt, and of each answer."""


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """A number of streaming chats with random prompts, sent by vLLM's client with a fixed concurrency."""

    concurrency: int
    requests: int

    mode = f"vllm bench serve, {TOKENS} tokens in and out"

    def measure(self, base_url: str) -> dict[str, float]:
        """Send all requests to the server at `base_url` and return the figures, and how many tokens were generated.

        Raises:
            RuntimeError: a request failed.
        """
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        words = f"--backend openai-chat --base-url {base_url.removesuffix('/v1')} --endpoint /v1/chat/completions"
        words += f" --model tiny --tokenizer {MODEL} --dataset-name random --random-input-len {TOKENS}"
        words += f" --random-output-len {TOKENS} --ignore-eos --temperature 0 --disable-tqdm"
        words += f" --num-prompts {self.requests} --max-concurrency {self.concurrency}"
        with redirect_stdout(StringIO()):
            arguments = parser.parse_args([*words.split(), "--header", "Authorization=Bearer any"])
            result = asyncio.run(main_async(arguments))
        if result["completed"] != self.requests:
            raise RuntimeError(f"{self.requests - result['completed']} of {self.requests} requests failed")
        return {
            "tokens/s": float(result["output_throughput"]),
            "requests/s": float(result["request_throughput"]),
            "TTFT p50 ms": float(result["median_ttft_ms"]),
            "tokens": float(result["total_output_tokens"]),
        }
