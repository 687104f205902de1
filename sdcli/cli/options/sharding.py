"""What `generate --shard` needs: options that fit, a seed that all shards have, and the jobs of one shard."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from sdcli.errors import UsageError
from sdcli.generation.filenames import is_literal
from sdcli.generation.journal import Journal
from sdcli.generation.resolve.jobs import BadJob, ResolvedJob
from sdcli.generation.run_shard import BASE_SEED, RunShard
from sdcli.generation.settings import OutputSettings, RunSettings


def check_sharding(
    prompts_file: str | None,
    *,
    template: str | None,
    sweep: Sequence[str] | None,
    keep_warm: str | None,
    cluster: str | None,
) -> None:
    """Raise UsageError for options that --shard cannot honour."""
    if prompts_file is None:
        raise UsageError("--shard divides the images of a --prompts-file, and there is none")
    if cluster is not None:
        raise UsageError("--shard does not go with --cluster, which divides the work itself")
    if sweep:
        raise UsageError("--shard does not go with --sweep, whose sheet needs all images in one run")
    if keep_warm is not None:
        raise UsageError("--shard does not go with --keep-warm: a shard generates in a process of its own")
    if template is not None and is_literal(template):
        raise UsageError(
            f"--shard: -o {template} names one file for all images; use a template, as in -o '{{index:05}}-{{prompt}}'"
        )


def check_divided(shard: str | None, cluster: str | None, output: Path | None) -> None:
    """Raise UsageError for what a run in parts cannot honour: two ways to divide it, and one file for all."""
    if shard is not None and cluster is not None:
        raise UsageError("--shard does not go with --cluster, which divides the work itself")
    if output is not None and (shard is not None or cluster is not None):
        flag = "--shard" if shard is not None else "--cluster"
        raise UsageError(f"-o names one file, which several processes cannot write; use --outdir with {flag}")


def start_journal(prompts_file: str, output: OutputSettings, shard: RunShard | None) -> tuple[Journal, str, int]:
    """The journal of the output folder, with this run begun in it, the file's name there, and the run's base seed.

    A run that resumes keeps the base seed of the one before; shards have the same one without knowing of each other.
    """
    journal = Journal(output.outdir, None if shard is None else shard.name)
    source = "-" if prompts_file == "-" else str(Path(prompts_file).resolve())
    earlier = journal.base_seed(source) if output.resume else None
    base_seed = earlier if earlier is not None else secrets.randbelow(2**32) if shard is None else BASE_SEED
    if earlier is None or shard is not None:
        journal.begin_run(source, base_seed)
    return journal, source, base_seed


def part_of(jobs: Sequence[ResolvedJob | BadJob], shard: RunShard, run: RunSettings) -> list[ResolvedJob | BadJob]:
    """The jobs of a shard in their order; asks which device there is, on which the size of batches depends."""
    from sdcli.generation.model_cache import ModelCache
    from sdcli.generation.plan import plan

    good = [job for job in jobs if isinstance(job, ResolvedJob)]
    own = {job.index for batch in shard.part(plan(good, ModelCache(run).limits)) for job in batch.jobs}
    return [job for job in jobs if (job.index in own if isinstance(job, ResolvedJob) else reports(shard, job.index))]


def reports(shard: RunShard | None, index: int) -> bool:
    """Whether a shard reports that the job of this index cannot be generated: each such job is reported once."""
    return shard is None or shard.takes(index - 1)
