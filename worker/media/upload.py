"""Uploads of results to links, with attempts after failures."""

import re
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path

from worker.errors import LinkServerRefusedError
from worker.media.fetch import UPLOAD_REDIRECTS, Fetcher, Policy
from worker.media.retry import retried


async def upload(
    policy: Policy,
    link: str,
    data: bytes | Path,
    headers: Mapping[str, str],
    redirects: Iterable[int] = UPLOAD_REDIRECTS,
) -> None:
    """Upload data, or a file, to a link; try again if its server is away or has failed. The caller limits the time.

    Raises:
        MediaError: the link is not allowed, or its server has not accepted the data.
    """
    async with aclosing(Fetcher(policy)) as fetcher:
        await retried(partial(fetcher.put, link, data, headers, redirects))


async def upload_presigned(policy: Policy, link: str, data: bytes | Path, content_type: str) -> str:
    """Upload data, or a file, to a link that its caller has presigned. Return the link without its signature.

    Raises:
        MediaError: the link is not allowed, or its server has not accepted the data.
    """
    try:
        await upload(policy, link, data, {"Content-Type": content_type})
    except LinkServerRefusedError:
        # Signatures of S3's second version cover the content type, even if the link was signed without one.
        await upload(policy, link, data, {})
    return re.split("[?#]", link, maxsplit=1)[0]
