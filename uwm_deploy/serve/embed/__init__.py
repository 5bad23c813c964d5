"""Embeds millions of items: a batch-in batch-out callable, Parquet parts that appear whole, a job that resumes by key."""

from __future__ import annotations

from uwm_deploy.serve.embed.batch import EmbedBatch
from uwm_deploy.serve.embed.parts import PartWriter, finished_keys

__all__ = ["EmbedBatch", "PartWriter", "finished_keys"]
