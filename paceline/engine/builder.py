"""Puts an engine together from a config and a loaded model."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.cache.block_manager import BlockManager
from paceline.cache.paged_kv import PagedKV
from paceline.config import EngineConfig
from paceline.draft import registry as drafters
from paceline.draft.base import Drafter
from paceline.draft.drafting import Drafting
from paceline.draft.self_model import Target
from paceline.draft.shapes.base import TreeShape
from paceline.engine.commit import Committer
from paceline.engine.engine import Engine, Stages
from paceline.engine.layer_search import best_layers
from paceline.engine.profile import cost_table
from paceline.engine.race import race
from paceline.engine.rng import Noise, Stream
from paceline.engine.speculation import Speculation, check_speculation
from paceline.engine.types import TargetTransform
from paceline.errors import ConfigError, SpeculationSpecError
from paceline.model.draft_weights import check_is_draft_or_model, is_draft, load_draft
from paceline.model.head_subset import cut_head, read_ranking
from paceline.model.loader import LoadedModel, load_model
from paceline.model.packed_linear import pack_linears
from paceline.model.runner import ModelRunner, StepLimits, kv_shape
from paceline.model.tiled_linear import tile_linears
from paceline.plan.base import DrafterLimits, LengthPolicy
from paceline.plan.cost_model import CostModel
from paceline.plan.registry import create_policy
from paceline.plan.spec import DrafterSpec, SpeculationSpec
from paceline.plan.survival import AcceptanceEstimates
from paceline.schedule.scheduler import Scheduler
from paceline.verify.verifier import Verifier

logger = logging.getLogger(__name__)
_CPU_KV_BYTES = 1 << 30
_CUDA_KV_SHARE = 0.8
"""Of the memory that is free after loading."""
_GRAPH_BYTES = 768 << 20
"""For captured graphs, and attention over split keys."""
_DRAFTS_EACH, _MOST_DRAFTS = 8, 512
"""Draft nodes for each request, and of a step, up to which its shape is prepared."""


def build_engine(
    config: EngineConfig, loaded: LoadedModel, on_progress: Callable[[str], None] = lambda _: None
) -> Engine:
    """An engine ready for requests.

    Raises:
        ConfigError: the KV cache cannot hold one full sequence, or the model is not made for that length.
        SpeculationSpecError: a drafter was given more nodes than a sequence may have tokens.
    """
    speculation = check_speculation(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    race(np.zeros(2, np.float32), Noise(0), 0, Stream.TARGET)  # compiled here, not in somebody's first step
    runner, blocks, max_model_len = _runner(config, loaded, *_wanted_length(config, loaded), on_progress)
    _check_budgets(speculation.spec, max_model_len)
    vocab_size = int(loaded.config.vocab_size)
    made = _drafters(config, speculation, loaded, Target(runner, blocks, max_model_len), vocab_size, on_progress)

    def cost() -> CostModel:
        table = cost_table(loaded, runner, blocks, max_model_len, on_progress)
        return CostModel(table, overlaps=runner.most_carried > 0)

    policy = _policy(speculation, made, cost)
    transform = _transform(made)
    stages = Stages(
        scheduler=Scheduler(
            blocks, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
        ),
        policy=policy,
        drafting=Drafting(
            made,
            merge_trees=not speculation.chain,
            vocab_size=vocab_size,
            room=None if transform is None else transform.room,
        ),
        verifier=Verifier(runner, shares_noise=speculation.rule.shares_noise, transform=transform),
        rule=speculation.rule,
        committer=Committer(runner.kv, blocks, loaded.tokenizer, loaded.eos_token_ids, max_model_len),
    )
    return Engine(
        stages,
        runner,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=loaded.eos_token_ids,
    )


def _wanted_length(config: EngineConfig, loaded: LoadedModel) -> tuple[int, bool]:
    """The longest sequence, and whether the caller insists on it."""
    if config.max_model_len is None:
        return loaded.max_model_len, False
    if config.max_model_len > loaded.max_model_len:
        raise ConfigError(
            f"is {config.max_model_len}, and {loaded.name} was made for {loaded.max_model_len} tokens.",
            field="max_model_len",
            fix="Give at most that, or leave it out.",
        )
    return config.max_model_len, True


def _runner(
    config: EngineConfig,
    loaded: LoadedModel,
    max_model_len: int,
    length_is_wanted: bool,
    on_progress: Callable[[str], None],
) -> tuple[ModelRunner, BlockManager, int]:
    """A runner with a cache that holds at least one full sequence; returns the length that fits, too."""
    if loaded.device.type == "cpu":
        if loaded.kept_kinds:
            tile_linears(loaded.model)
        pack_linears(loaded.model)
    shape = kv_shape(loaded.config, loaded.dtype)
    per_block = shape.bytes_per_token * config.block_size
    needed = -(-max_model_len // config.block_size)
    drafts = min(_MOST_DRAFTS, _DRAFTS_EACH * config.max_num_seqs)
    most, rows = config.max_num_batched_tokens + drafts, config.max_num_seqs + drafts
    budget = config.kv_cache_memory or _default_kv_bytes(
        loaded.device, needed * per_block, _workspace_bytes(loaded, most, rows, max_model_len)
    )
    num_blocks = min(budget // per_block, needed * config.max_num_seqs)
    if num_blocks < needed:
        fits = num_blocks * config.block_size
        if length_is_wanted or fits < 2 * config.block_size:
            raise ConfigError(
                f"{budget >> 20} MiB hold {fits} tokens, and one sequence may have {max_model_len}.",
                field="kv_cache_memory",
                fix=f"Give at least {needed * per_block} bytes, or lower max_model_len to {fits}.",
            )
        logger.warning(
            "memory for the KV cache allows %d tokens a sequence instead of %d; kv_cache_memory sets it",
            fits,
            max_model_len,
        )
        max_model_len = fits
    kv = PagedKV(shape, num_blocks, config.block_size, loaded.device)
    blocks = BlockManager(num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching)
    limits = StepLimits(most, config.max_num_seqs, max_model_len, rows, config.eager)
    runner = ModelRunner(loaded.model, kv, loaded.device, limits)
    runner.warm_up(
        lambda done, total: on_progress(f"capturing CUDA graphs ({done}/{total})"), trees=config.speculation != "none"
    )
    return runner, blocks, max_model_len


def _workspace_bytes(loaded: LoadedModel, tokens: int, rows: int, length: int) -> int:
    """What the forward on a GPU takes beside weights and KV, taken high (`model/gpu/graphs.py`)."""
    config: Any = loaded.config
    hidden = int(config.hidden_size)
    widest = 3 * hidden + 4 * int(getattr(config, "intermediate_size", None) or 4 * hidden)
    rotary = 2 * length * 256 * 4
    return 4 * rows * int(config.vocab_size) + loaded.dtype.itemsize * tokens * widest + rotary + _GRAPH_BYTES


def _default_kv_bytes(device: torch.device, one_sequence: int, workspace: int) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(max(torch.cuda.mem_get_info(device)[0] - workspace, 0) * _CUDA_KV_SHARE)
    return min(max(_CPU_KV_BYTES, one_sequence), _available_memory() // 2)


def _available_memory() -> int:
    """Bytes that can be taken without swapping; the page cache counts as available."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_budgets(spec: SpeculationSpec, max_model_len: int) -> None:
    """Refuse a drafter that was given more nodes than a sequence may have tokens."""
    for drafter in spec.drafters:
        most = max(drafter.k or 0, drafter.maximum or 0)
        if most >= max_model_len:
            raise SpeculationSpecError(
                f"{drafter.name} may draft {most} tokens, and a sequence may have {max_model_len} in all.",
                field="speculation",
                fix=f"Give it fewer than {max_model_len}, or raise max_model_len.",
            )


def _drafters(
    config: EngineConfig,
    speculation: Speculation,
    loaded: LoadedModel,
    target: Target,
    vocab_size: int,
    on_progress: Callable[[str], None],
) -> dict[str, Drafter]:
    made: dict[str, Drafter] = {}
    for wanted in speculation.spec.drafters:
        if speculation.spec.text == "auto" and drafters.entry(wanted.name).whole_context and target.has_windows:
            continue
        options = drafters.parse_options(wanted.name, wanted.options)
        supplies: dict[str, Any] = {
            "vocab_size": vocab_size,
            "chain": speculation.chain,
            "coupled": speculation.rule.shares_noise,
            "shape": speculation.shape,
            "stop_ids": loaded.eos_token_ids,
            "target": target,
            "best_layers": partial(best_layers, loaded, target.runner, target.blocks, on_progress),
            "tokenizer": loaded.tokenizer,
        }
        if drafters.entry(wanted.name).has_model:
            draft = _load_draft(options.pop("model"), config, loaded, on_progress)
            if "vocab" in options:
                _check_own_head(wanted.name, draft, loaded)
                cut_head(draft, read_ranking(options.pop("vocab"), draft).tolist())
            longest = min(draft.max_model_len, loaded.max_model_len)
            supplies["runner"], supplies["blocks"], supplies["max_model_len"] = _runner(
                config, draft, longest, False, on_progress
            )
        made[wanted.name] = drafters.create(wanted.name, options, supplies)
    return made


def _load_draft(
    model: str, config: EngineConfig, target: LoadedModel, on_progress: Callable[[str], None]
) -> LoadedModel:
    """Load a draft model, which may live on the target's embeddings, or be the target (`self`); refuse one whose tokens
    mean something else."""
    if model == "self":
        return target
    on_progress(f"loading draft model {model}")
    check_is_draft_or_model(model)
    if is_draft(model):
        return load_draft(model, target)
    # Beside a target in a file's own precision the draft may keep its file's, too.
    name = "auto" if target.kept_kinds else str(target.dtype).removeprefix("torch.")
    draft = load_model(
        model,
        dtype=name,
        device=str(target.device),
        activations=config.activations,
        trust_remote_code=config.trust_remote_code,
    )
    if draft.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise SpeculationSpecError(
            f"draft model {model} has another tokenizer than the target.",
            field="speculation",
            fix="Choose a draft of the same model family, or a drafter that needs no model (ngram, recycling).",
        )
    return draft


def _check_own_head(name: str, draft: LoadedModel, target: LoadedModel) -> None:
    if draft is target:
        raise SpeculationSpecError(
            f"{name}:model=self drafts with the target's own head, which cannot be cut.",
            field="speculation",
            fix="Leave vocab out, or give another draft model.",
        )


def _transform(made: Mapping[str, Drafter]) -> TargetTransform | None:
    """The target transform that a drafter's options declare."""
    return next((t for d in made.values() if (t := getattr(d, "target_transform", None)) is not None), None)


def _policy(
    speculation: Speculation, made: Mapping[str, Drafter], cost: Callable[[], CostModel]
) -> LengthPolicy | None:
    spec = speculation.spec
    if not spec.drafters:
        return None
    limits = [
        _limits(d, made[d.name], speculation.shape, is_fixed=d.k is not None and spec.policy != "fixed")
        for d in spec.drafters
        if d.name in made
    ]
    costly = [name for name, drafter in made.items() if drafter.cost_per_token]
    estimates = AcceptanceEstimates({name: drafter.prior for name, drafter in made.items()}, by_depth=costly)
    return create_policy(spec.policy, speculation.policy_options, limits, estimates, cost)


def _limits(wanted: DrafterSpec, drafter: Drafter, shape: TreeShape, *, is_fixed: bool) -> DrafterLimits:
    width = getattr(drafter, "width", shape.width) if drafter.cost_per_token else 1.0
    given = wanted.maximum if wanted.k is None else wanted.k
    most = drafters.entry(wanted.name).most if given is None else given
    by_rank = drafter.cost_per_token and shape.by_rank
    hidden_size: int | None = getattr(drafter, "hidden_size", None)  # only draft models have hidden states
    least: int = getattr(drafter, "least_tokens", 0)  # only drafters that read part of long contexts
    return DrafterLimits(wanted.name, most, drafter.cost_per_token, is_fixed, width, by_rank, hidden_size, least)
