"""`--scheduler-cls paceline.integrations.vllm.scheduler`: vLLM calls it where it would make its own scheduler.

It answers with a subclass of vLLM's `Scheduler` or `AsyncScheduler`, whichever fits the mode: a plain one under async
scheduling would never receive drafts, and speculation would silently stop.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from paceline.integrations.vllm.compatibility import HOOKS, judge
from paceline.integrations.vllm.controller import Controller
from paceline.integrations.vllm.hooks import PacedScheduler
from paceline.integrations.vllm.metrics import Meter
from paceline.integrations.vllm.options import Options

logger = logging.getLogger("vllm.paceline")  # below vLLM's logger, so that its handlers show it


def scheduler(*args: Any, **kwargs: Any) -> Any:
    """vLLM's scheduler with Paceline's pace, or vLLM's own where the two do not fit.

    Raises:
        ConfigError: an option under `additional-config` is wrong; the message has the allowed ones.
    """
    from vllm import __version__ as version

    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    options = Options.read(config.additional_config)
    base = _base(bool(config.scheduler_config.async_scheduling))
    missing = [name for name in HOOKS if not hasattr(base, name)]
    verdict = judge(version, missing, config, options)
    if verdict.method is None:
        logger.log(logging.WARNING if verdict.warns else logging.INFO, "Paceline stands aside: %s", verdict.reason)
        return base(*args, **kwargs)
    logger.info("Paceline sets the pace of %s", verdict.reason)
    made = _paced(base)(*args, **kwargs)
    controller = Controller(verdict.method, options, config.model_config.max_model_len)
    meter = Meter(verdict.method.most) if options.metrics else None
    made.pace_with(controller, meter)
    return made


def _base(is_async: bool) -> Any:
    if is_async:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        return AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    return Scheduler


@cache
def _paced(base: Any) -> Any:
    return type(f"Paced{base.__name__}", (PacedScheduler, base), {})
