"""Caption every image of a folder, several at once, and write the captions as JSON lines.

    RUNPOD_API_KEY=… python examples/caption_images.py photos --endpoint ENDPOINT_ID
    API_KEY=… python examples/caption_images.py photos --base-url http://127.0.0.1:8000/v1 --concurrency 16

Each line is {"file": …, "caption": …}. An image that has its line is not asked about again: when the program was
stopped, or some images failed, run it once more. The exit code is 1 when any failed. Needs: pip install openai
"""

import argparse
import asyncio
import base64
import json
import mimetypes
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import openai

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


def main() -> int:
    """Caption what has no caption yet; return the exit code."""
    options = parse_arguments()
    try:
        done = captioned(options.output)
        left = [path for path in images(options.folder) if name(path, options.folder) not in done]
        print(f"captions: {len(done)} are there, {len(left)} to come", file=sys.stderr)
        with options.output.open("a", encoding="utf-8") as output:
            failed = asyncio.run(caption_all(left, output, options))
    except (OSError, ValueError, openai.OpenAIError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run it again to go on", file=sys.stderr)
        return 130
    if failed:
        print(f"{failed} of {len(left)} images failed; run it again for them", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="default: captions.jsonl in the folder")
    parser.add_argument("--prompt", default="Describe this picture.")
    parser.add_argument("--concurrency", type=int, default=8, help="images at once (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--model", help="the model's name, by default the first one that is served")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--endpoint", metavar="ENDPOINT_ID", help="a RunPod endpoint; its key is RUNPOD_API_KEY")
    where.add_argument("--base-url", help="another server's address, with /v1; its key is API_KEY")
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    if options.concurrency < 1:
        parser.error("--concurrency must be 1 or more")
    options.output = options.output or options.folder / "captions.jsonl"
    return options


def connect(options: argparse.Namespace) -> openai.AsyncOpenAI:
    """Return a client; it tries again, a little later each time, what failed on the way or was too much at once."""
    if options.endpoint:
        base_url, key = f"https://api.runpod.ai/v2/{options.endpoint}/openai/v1", os.environ.get("RUNPOD_API_KEY", "")
        if not key:
            raise ValueError("RUNPOD_API_KEY is not set")
    else:
        base_url, key = options.base_url, os.environ.get("API_KEY", "none")
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=4)


def images(folder: Path) -> list[Path]:
    """Return the image files of a folder and of those in it."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS and path.is_file())


def name(path: Path, folder: Path) -> str:
    """Return what a file is called in the output."""
    return path.relative_to(folder).as_posix()


def captioned(output: Path) -> set[str]:
    """Return the names of the files that have their captions; a line that was cut off does not count."""
    if not output.exists():
        return set()
    text = output.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        output.write_text(text, encoding="utf-8")
    return {json.loads(line)["file"] for line in text.splitlines()}


async def caption_all(paths: list[Path], output: TextIO, options: argparse.Namespace) -> int:
    """Write a line for each image; return how many failed."""
    failed = 0
    waiting = iter(paths)
    async with connect(options) as client:
        model = options.model or (await anext(aiter(client.models.list()))).id

        async def work() -> None:
            nonlocal failed
            for path in waiting:
                file = name(path, options.folder)
                try:
                    caption = await caption_of(client, model, path, options)
                except (OSError, openai.OpenAIError) as error:
                    failed += 1
                    print(f"{file}: {error}", file=sys.stderr)
                    continue
                output.write(json.dumps({"file": file, "caption": caption}, ensure_ascii=False) + "\n")
                output.flush()
                print(f"{file}: {caption}", file=sys.stderr)

        await asyncio.gather(*(work() for _ in range(options.concurrency)))
    return failed


async def caption_of(client: openai.AsyncOpenAI, model: str, path: Path, options: argparse.Namespace) -> str:
    """Ask for one image's caption."""
    data = base64.b64encode(await asyncio.to_thread(path.read_bytes)).decode()
    url = f"data:{mimetypes.guess_type(path.name)[0] or 'image/png'};base64,{data}"
    parts: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": options.prompt}]
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": parts}], max_tokens=options.max_tokens
    )
    return (answer.choices[0].message.content or "").strip()


if __name__ == "__main__":
    sys.exit(main())
