"""Downloads a model into the image at build time: `python builder/bake_model.py [FOLDER]`.

The worker's own variables, such as MODEL_NAME and MODEL_REVISION, choose the model. The token for a gated model is a
build secret, which is kept in no layer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from worker.errors import StartupError
from worker.model import repositories, snapshots
from worker.model.download import download
from worker.settings import environment, read

SECRET = Path("/run/secrets/HF_TOKEN")


def main(folder: Path = snapshots.BAKED) -> int:
    """Download the model into `folder`, where the worker searches first. Do nothing without MODEL_NAME."""
    environ = environment.read() | {"DOWNLOAD_DIR": str(folder)}
    if not environ.get("MODEL_NAME"):
        sys.stdout.write("MODEL_NAME is not set: the image contains no model\n")
        return 0
    if SECRET.is_file():
        environ["HF_TOKEN"] = SECRET.read_text().strip()
    try:
        settings = read(environ)
        for repository in (repositories.model(settings), *repositories.others(settings)):
            snapshot = download(repository, settings)
            if snapshots.find(repository, [folder]) is None:
                raise StartupError(f"{repository.value}: the repository lacks files that the worker needs")
            sys.stdout.write(f"{repository.value} is in {snapshot}\n")
    except StartupError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
