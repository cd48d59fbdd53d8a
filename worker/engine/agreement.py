"""The terms of this node: vLLM's arguments and variables, and the content of its model folders."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from vllm import envs

from worker.cluster import terms
from worker.cluster.role import Role
from worker.cluster.terms import Terms
from worker.engine.arguments import changed
from worker.engine.parallelism import visible_gpus
from worker.model import identity


def terms_of(args: Namespace, folders: Mapping[str, Path], role: Role) -> Terms:
    """Return the terms of this node: its placed arguments, the content of `folders`, and vLLM's variables."""
    visible = visible_gpus()
    gpus = 0 if visible is None else role.usable_gpus(visible)
    snapshots = {str(folder): identity.of_folder(folder) for folder in folders.values()}
    engine = terms.of_engine(snapshots, changed(args), envs.compile_factors(), gpus)
    # The head tells the others to load an adapter from its own path.
    return {**engine, **terms.of({f"FOLDER OF ADAPTER {each.name}": each.path for each in args.lora_modules or ()})}
