"""What an earlier daemon may have left half-written in its folders. Imports no torch.

Only names that hogwild itself makes are touched. Each writer that replaces a file writes a temporary one first, so a
leftover is never the only copy of anything:

    <state>/status.tmp, running.tmp           -> removed
    <spool>/failed/.<name>.errors.jsonl.tmp   -> removed; the errors are written anew from the ledger
    <state>/checkpoints/.unfinished-*         -> removed by `Checkpoints`
    <spool>/.moving/*                         -> brought back to incoming/ by `Spool`
    a line "staging" in the ledger            -> forgotten, its file is read again, by `Ledger`
    arena.sock that nobody listens on         -> replaced by `Hub`
"""

from pathlib import Path

from hogwild import log

logger = log.get(__name__)


def sweep(state_dir: Path, spool: Path) -> list[Path]:
    """Remove temporary files that a crash left; returns them. Called by the one daemon that owns the folders."""
    found = [
        state_dir / "status.tmp",
        state_dir / "running.tmp",
        *(spool / "failed").glob(".*.errors.jsonl.tmp"),
    ]
    removed = []
    for path in found:
        try:
            path.unlink()
            removed.append(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("leftovers.kept", path=str(path), error=str(error))
    if removed:
        logger.info("leftovers.removed", paths=[str(path) for path in removed])
    return removed
