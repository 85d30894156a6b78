"""The catalogue: 64 papers in the order of their list. A system is in when its line names its tests.

Adding one is a file `paceline/bench/systems/NAME.py` with `run = suite(...)`, the path in its line here, and its line in
`docs/systems.md`. Nothing is imported before it runs.
"""

# ruff: noqa: E501  (one line per paper)
from __future__ import annotations

import difflib
from collections.abc import Sequence

from paceline.bench.systems.base import System
from paceline.errors import InputError

# fmt: off
SYSTEMS: tuple[System, ...] = (
    System(1, "smartspec", "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", "2406.14066", "speculation", "paceline.bench.systems.smartspec:run"),
    System(2, "specdec++", "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths", "2405.19715", "speculation", "paceline.bench.systems.specdec:run"),
    System(3, "l1", "L1: Controlling How Long A Reasoning Model Thinks With Reinforcement Learning", "2503.04697", "length control"),
    System(4, "concise-thoughts", "Concise Thoughts: Impact of Output Length on LLM Reasoning and Cost", "2407.19825", "length control"),
    System(5, "flenqa", "Same Task, More Tokens: the Impact of Input Length on the Reasoning Performance of Large Language Models", "2402.14848", "long context"),
    System(6, "tops", "Towards Thinking-Optimal Scaling of Test-Time Compute for LLM Reasoning", "2502.18080", "length control"),
    System(7, "speculative-streaming", "Speculative Streaming: Fast LLM Inference without Auxiliary Models", "2402.11131", "speculation"),
    System(8, "online-sd", "Online Speculative Decoding", "2310.07177", "speculation"),
    System(9, "llama3-80k", "Extending Llama-3's Context Ten-Fold Overnight", "2404.19553", "long context"),
    System(10, "rsd", "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement", "2402.14160", "speculation", "paceline.bench.systems.rsd:run"),
    System(11, "magicdec", "MagicDec: Breaking the Latency-Throughput Tradeoff for Long Context Generation with Speculative Decoding", "2408.11049", "speculation", "paceline.bench.systems.magicdec:run"),
    System(12, "pearl", "Parallel Speculative Decoding with Adaptive Draft Length", "2408.11850", "speculation", "paceline.bench.systems.pearl:run"),
    System(13, "decoding-sd", "Decoding Speculative Decoding", "2402.01528", "speculation", "paceline.bench.systems.decoding_sd:run"),
    System(14, "length-correlations", "A Long Way to Go: Investigating Length Correlations in RLHF", "2310.03716", "length bias"),
    System(15, "ems-sd", "EMS-SD: Efficient Multi-sample Speculative Decoding for Accelerating Large Language Models", "2405.07542", "speculation", "paceline.bench.systems.ems_sd:run"),
    System(16, "skippredict", "SkipPredict: When to Invest in Predictions for Scheduling", "2402.03564", "scheduling"),
    System(17, "c3ot", "C3oT: Generating Shorter Chain-of-Thought without Compromising Effectiveness", "2412.11664", "length control"),
    System(18, "really-long", "Is It Really Long Context if All You Need Is Retrieval? Towards Genuinely Difficult Long Context NLP", "2407.00402", "long context"),
    System(19, "length-probing", "Black-box language model explanation by context length probing", "2212.14815", "long context"),
    System(20, "bass", "BASS: Batched Attention-optimized Speculative Sampling", "2404.15778", "speculation", "paceline.bench.systems.bass:run"),
    System(21, "length-generalization", "Exploring Length Generalization in Large Language Models", "2207.04901", "long context"),
    System(22, "svip", "Draft Model Knows When to Stop: A Self-Verification Length Policy for Speculative Decoding", "2411.18462", "speculation", "paceline.bench.systems.svip:run"),
    System(23, "o3-mini", "The Relationship Between Reasoning and Performance in Large Language Models - o3 (mini) Thinks Harder, Not Longer", "2502.15631", "length control"),
    System(24, "link", "In Search of the Long-Tail: Systematic Generation of Long-Tail Knowledge via Logical Rule Guided Search", "2311.07237", "uncertainty"),
    System(25, "heaps", "Heaps' law and Heaps functions in tagged texts: Evidences of their linguistic relevance", "2001.02178", "uncertainty"),
    System(26, "predictive-uncertainty", "Introducing an Improved Information-Theoretic Measure of Predictive Uncertainty", "2311.08309", "uncertainty"),
    System(27, "financial-reports", "Numerical Reasoning for Financial Reports", "2312.14870", "applications"),
    System(28, "easyspec", "EasySpec: Layer-Parallel Speculative Decoding for Efficient Multi-GPU Utilization", "2502.02493", "speculation", "paceline.bench.systems.easyspec:run"),
    System(29, "longwriter", "LongWriter: Unleashing 10,000+ Word Generation from Long Context LLMs", "2408.07055", "long context"),
    System(30, "token-recycling", "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling", "2408.08696", "speculation", "paceline.bench.systems.token_recycling:run"),
    System(31, "lc-alpacaeval", "Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators", "2404.04475", "length bias"),
    System(32, "relay-attention", "RelayAttention for Efficient Large Language Model Serving with Long System Prompts", "2402.14808", "scheduling"),
    System(33, "s3", "S^3: Increasing GPU Utilization during Generative Inference for Higher Throughput", "2306.06000", "scheduling"),
    System(34, "sequoia", "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding", "2402.12374", "speculation", "paceline.bench.systems.sequoia:run"),
    System(35, "pipeinfer", "PipeInfer: Accelerating LLM Inference using Asynchronous Pipelined Speculation", "2407.11798", "speculation", "paceline.bench.systems.pipeinfer:run"),
    System(36, "learning-to-rank", "Efficient LLM Scheduling by Learning to Rank", "2408.15792", "scheduling"),
    System(37, "stock-headlines", "Can ChatGPT Forecast Stock Price Movements? Return Predictability and Large Language Models", "2304.07619", "applications"),
    System(38, "to-believe", "To Believe or Not to Believe Your LLM", "2406.02543", "uncertainty"),
    System(39, "staged", "Accelerating LLM Inference with Staged Speculative Decoding", "2308.04623", "speculation", "paceline.bench.systems.staged:run"),
    System(40, "thinkpo", "Thinking Preference Optimization", "2502.13173", "length control"),
    System(41, "o1-pruner", "O1-Pruner: Length-Harmonizing Fine-Tuning for O1-Like Reasoning Pruning", "2501.12570", "length control"),
    System(42, "sirllm", "SirLLM: Streaming Infinite Retentive LLM", "2405.12528", "long context"),
    System(43, "clover", "Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge", "2405.00263", "speculation"),
    System(44, "ibm-speculator", "Accelerating Production LLMs with Combined Token/Embedding Speculators", "2404.19124", "speculation"),
    System(45, "s3d", "S3D: A Simple and Cost-Effective Self-Speculative Decoding Scheme for Low-Memory GPUs", "2405.20314", "speculation", "paceline.bench.systems.s3d:run"),
    System(46, "multi-candidate", "Improving Multi-candidate Speculative Decoding", "2409.10644", "speculation", "paceline.bench.systems.mcsd:run"),
    System(47, "rapid", "Long-Context Inference with Retrieval-Augmented Speculative Decoding", "2502.20330", "speculation", "paceline.bench.systems.rapid:run"),
    System(48, "packing", "Efficient Sequence Packing without Cross-contamination: Accelerating Large Language Models without Impacting Performance", "2107.02027", "scheduling"),
    System(49, "ouroboros", "Ouroboros: Speculative Decoding with Large Model Enhanced Drafting", "2402.13720", "speculation", "paceline.bench.systems.ouroboros:run"),
    System(50, "universal-learners", "Auto-Regressive Next-Token Predictors are Universal Learners", "2309.06979", "length control"),
    System(51, "deltabench", "Can Large Language Models Detect Errors in Long Chain-of-Thought Reasoning?", "2502.19361", "length control"),
    System(52, "specdiff", "Speculative Diffusion Decoding: Accelerating Language Generation through Diffusion", "2408.05636", "speculation"),
    System(53, "demonstrations", "LLMs Can Easily Learn to Reason from Demonstrations: Structure, not content, is what matters!", "2502.07374", "length control"),
    System(54, "longreason", "LongReason: A Synthetic Long-Context Reasoning Benchmark via Context Expansion", "2501.15089", "long context"),
    System(55, "deep-relu", "Deep ReLU Networks Preserve Expected Length", "2102.10492", "applications"),
    System(56, "seed", "SEED: Accelerating Reasoning Tree Construction via Scheduled Speculative Decoding", "2406.18200", "speculation", "paceline.bench.systems.seed:run"),
    System(57, "zero-shot-tests", "Zero-Shot Statistical Tests for LLM-Generated Text Detection using Finite Sample Concentration Inequalities", "2501.02406", "uncertainty"),
    System(58, "chen", "Accelerating Large Language Model Decoding with Speculative Sampling", "2302.01318", "speculation", "paceline.bench.systems.chen:run"),
    System(59, "odin", "ODIN: Disentangled Reward Mitigates Hacking in RLHF", "2402.07319", "length bias"),
    System(60, "unseen-questions", "Answering Unseen Questions With Smaller Language Models Using Rationale Generation and Dense Retrieval", "2308.04711", "applications"),
    System(61, "cot-valve", "CoT-Valve: Length-Compressible Chain-of-Thought Tuning", "2502.09601", "length control"),
    System(62, "spec-bench", "Unlocking Efficiency in Large Language Model Inference: A Comprehensive Survey of Speculative Decoding", "2401.07851", "speculation", "paceline.bench.systems.spec_bench:run"),
    System(63, "glide-cape", "GliDe with a CaPE: A Low-Hassle Method to Accelerate Speculative Decoding", "2402.02082", "speculation", "paceline.bench.systems.cape:run"),
    System(64, "fr-spec", "FR-Spec: Accelerating Large-Vocabulary Language Models via Frequency-Ranked Speculative Sampling", "2502.14856", "speculation", "paceline.bench.systems.fr_spec:run"),
)
# fmt: on

BY_NAME = {system.name: system for system in SYSTEMS}


def find(names: Sequence[str]) -> list[System]:
    """The systems of these names in the catalogue's order; all of them if no name is given.

    Raises:
        InputError: there is no such system; the message lists close names.
    """
    for name in names:
        if name not in BY_NAME:
            close = difflib.get_close_matches(name.lower(), BY_NAME, n=4)
            close = close or [known for known in BY_NAME if name.lower() in known][:4]
            fix = f"Did you mean {', '.join(close)}?" if close else "`paceline bench systems --list` shows all names."
            raise InputError(f"no system is called {name!r}.", field="NAME", fix=fix)
    return [system for system in SYSTEMS if not names or system.name in names]
