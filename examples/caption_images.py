"""Caption every image of a folder, several at the same time, and write the captions as JSON lines.

    RUNPOD_API_KEY=… python examples/caption_images.py photos --endpoint ENDPOINT_ID
    API_KEY=… python examples/caption_images.py photos --base-url http://127.0.0.1:8000/v1 --concurrency 16

Each line is {"file": …, "caption": …}. Images that already have a line are skipped: if the program was stopped, or some
images failed, run it again. The exit code is 1 if an image failed. Needs: pip install openai
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

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


def main() -> int:
    """Caption the images without a caption and return the exit code."""
    options = parse_arguments()
    try:
        done = captioned(options.output)
        remaining = [path for path in images(options.folder) if name(path, options.folder) not in done]
        print(f"images: {len(done)} have a caption, {len(remaining)} do not", file=sys.stderr)
        with options.output.open("a", encoding="utf-8") as output:
            failed = asyncio.run(caption_all(remaining, output, options))
    except (OSError, ValueError, openai.OpenAIError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run it again to continue", file=sys.stderr)
        return 130
    if failed:
        print(f"{failed} of {len(remaining)} images failed; run it again to retry them", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="default: captions.jsonl in the folder")
    parser.add_argument("--prompt", default="Describe this picture.")
    parser.add_argument("--concurrency", type=int, default=8, help="images at the same time (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--model", help="the model's name (default: the first model of the server)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--endpoint", metavar="ENDPOINT_ID", help="a RunPod endpoint; set its key in RUNPOD_API_KEY")
    target.add_argument("--base-url", help="another server's URL, with /v1; set its key in API_KEY")
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    if options.concurrency < 1:
        parser.error("--concurrency must be 1 or more")
    options.output = options.output or options.folder / "captions.jsonl"
    return options


def connect(options: argparse.Namespace) -> openai.AsyncOpenAI:
    """Return a client that retries requests, with growing delays, after connection errors, 429 and server errors."""
    if options.endpoint:
        base_url, key = f"https://api.runpod.ai/v2/{options.endpoint}/openai/v1", os.environ.get("RUNPOD_API_KEY", "")
        if not key:
            raise ValueError("RUNPOD_API_KEY is not set")
    else:
        base_url, key = options.base_url, os.environ.get("API_KEY", "none")
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=4)


def images(folder: Path) -> list[Path]:
    """Return the image files of a folder and its subfolders."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def name(path: Path, folder: Path) -> str:
    """Return the file's name in the output."""
    return path.relative_to(folder).as_posix()


def captioned(output: Path) -> set[str]:
    """Return the names of the files that have a caption. Removes an incomplete last line."""
    if not output.exists():
        return set()
    text = output.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        output.write_text(text, encoding="utf-8")
    return {json.loads(line)["file"] for line in text.splitlines()}


async def caption_all(paths: list[Path], output: TextIO, options: argparse.Namespace) -> int:
    """Write a line for each image and return the number of failures."""
    failed = 0
    queue = iter(paths)
    async with connect(options) as client:
        model = options.model or (await anext(aiter(client.models.list()))).id

        async def work() -> None:
            nonlocal failed
            for path in queue:
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
    """Return the caption of one image."""
    data = base64.b64encode(await asyncio.to_thread(path.read_bytes)).decode()
    url = f"data:{mimetypes.guess_type(path.name)[0] or 'image/png'};base64,{data}"
    parts: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": options.prompt}]
    completion = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": parts}], max_tokens=options.max_tokens
    )
    return (completion.choices[0].message.content or "").strip()


if __name__ == "__main__":
    sys.exit(main())
