"""Puts a model into the image while it is built: `python builder/bake_model.py`, with the worker's own variables.

`MODEL_NAME` and `MODEL_REVISION` name it; a token for a gated one is a build secret, which no layer keeps.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from worker.errors import StartupError
from worker.model import repositories, snapshots, weights
from worker.settings import settings as config
from worker.settings import sources

SECRET = Path("/run/secrets/HF_TOKEN")


def main(folder: Path = snapshots.BAKED) -> int:
    """Download the model into `folder`, where the worker looks first; without a MODEL_NAME, do nothing."""
    if not os.environ.get("MODEL_NAME"):
        sys.stdout.write("No MODEL_NAME: the image holds no model\n")
        return 0
    said = dict(sources.gather(os.environ).values) | {"DOWNLOAD_DIR": str(folder)}
    if SECRET.is_file():
        said["HF_TOKEN"] = SECRET.read_text().strip()
    try:
        settings = config.load(said)
        for wanted in repositories.wanted(settings, said):
            snapshot = weights.download(wanted, settings, said)
            if snapshots.find(wanted, [folder]) is None:
                raise StartupError(f"{wanted.written}: what was downloaded is not complete")
            sys.stdout.write(f"{wanted.written} is in {snapshot}\n")
    except StartupError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
