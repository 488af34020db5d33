"""Profiles of parallel training: models replicated in every process (ddp) or sharded over them (fsdp, zero3)."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from switchkd.counting import counted
from switchkd.errors import ConfigError
from switchkd.models.components import language_model_of, layers_of, tower_layers_of

PROFILES = {
    "ddp": "every process holds whole models; gradients are averaged",
    "fsdp": "weights, gradients, optimizer state and the frozen teacher's layers are sharded over the processes (FSDP2)",
    "zero3": "the student's weights, gradients and optimizer state are sharded over the processes (DeepSpeed ZeRO-3)",
}
# DeepSpeed's configuration; transformers replaces each "auto" with the value from the command line.
ZERO3: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,  # checkpoints can be opened with from_pretrained
    },
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "zero_allow_untested_optimizer": True,  # torch's AdamW, as in the other profiles
}


def check_processes(environment: Mapping[str, str], devices: int) -> None:
    """Compare the processes that torchrun started with the devices of this machine and the nodes of the Slurm job.

    Left alone, two nodes whose torchrun was told of one would train the same run twice, each into the other's folder.

    Args:
        environment: the process environment. devices: CUDA devices that this process sees; 0 on a CPU.

    Raises:
        ConfigError: more processes than devices, or other nodes than Slurm's; names both numbers.
    """
    here = _count(environment, "LOCAL_WORLD_SIZE")
    if devices and here > devices:
        raise ConfigError(
            f"torchrun started {counted(here, 'process')} on a machine with {counted(devices, 'GPU')}: pass "
            f"--nproc-per-node {devices}, or ask Slurm "
            f"for --gres=gpu:{here}"
        )
    launched, in_step = "LOCAL_RANK" in environment, "SLURM_STEP_NUM_NODES" in environment
    nodes = _count(environment, "SLURM_STEP_NUM_NODES" if in_step else "SLURM_JOB_NUM_NODES")
    started = _count(environment, "GROUP_WORLD_SIZE")
    if nodes == started or not (launched or in_step):
        return
    if not launched:
        raise ConfigError(
            f"Slurm starts this command on {nodes} nodes, and each would train the same run alone: start it with "
            "`srun torchrun --nnodes $SLURM_JOB_NUM_NODES …` (docs/scale.md), or on one node with `srun --nodes 1 --ntasks 1`"
        )
    if not in_step:
        raise ConfigError(
            f"Slurm gave this job {nodes} nodes, and torchrun started on {started}: put `srun` before torchrun, so that it starts "
            "on every node, and pass it --nnodes $SLURM_JOB_NUM_NODES; or ask for --nodes=1"
        )
    raise ConfigError(
        f"Slurm runs this step on {nodes} nodes, and torchrun was told of {started}: pass it --nnodes $SLURM_JOB_NUM_NODES, with "
        "one task a node (--ntasks-per-node=1), or ask for other nodes with `srun --nodes`"
    )


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "1")
    return int(text) if text.isdecimal() else 1


def profile_arguments(profile: str, environment: Any) -> dict[str, Any]:
    """Return the entries of `TrainingArguments` that select a profile.

    Args:
        environment: the process environment, which shows whether torchrun started this process.

    Raises:
        ConfigError: sharding without torchrun, or DeepSpeed is missing.
    """
    if profile == "ddp":
        return {}
    if "LOCAL_RANK" not in environment:
        raise ConfigError(
            f"--profile {profile} shares one model among processes: start it with "
            "`torchrun --nproc-per-node N --no-python switchkd train …`"
        )
    if profile == "fsdp":
        return {"fsdp": True, "fsdp_config": {"version": 2}}
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("--profile zero3 runs DeepSpeed, which is not installed: pip install 'switchkd[deepspeed]'")
    return {"deepspeed": ZERO3}


def require_checkpoint(profile: str, checkpoint: Path, processes: int) -> None:
    """Check that a profile can resume from a checkpoint; DeepSpeed's contain a shard for each process that wrote them.

    Raises:
        ConfigError: zero3 on one side only, or with another number of processes.
    """
    of_deepspeed = (checkpoint / "latest").is_file()
    if of_deepspeed != (profile == "zero3"):
        written = "zero3" if of_deepspeed else "ddp or fsdp"
        raise ConfigError(
            f"{checkpoint} was written with --profile {written}, {profile} cannot read it: pass --profile {written}"
        )
    wrote = len(list(checkpoint.glob("rng_*.json")))
    if of_deepspeed and wrote != processes:
        raise ConfigError(
            f"{checkpoint} was written with --profile zero3 by {counted(wrote, 'process')}, and only as many can "
            f"read it, not {processes}"
        )


@contextmanager
def loading_whole(arguments: TrainingArguments) -> Iterator[None]:
    """Make transformers load whole models under ZeRO-3; DeepSpeed shards the student when training begins.

    By default transformers loads every model in shards, including the frozen teacher, whose weights the losses read outside of
    DeepSpeed.
    """
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if arguments.deepspeed is not None:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def fit_fsdp(arguments: TrainingArguments, model: nn.Module) -> None:
    """Configure FSDP: which layers it shards, and gradient sums in float32, as in DistributedDataParallel.

    The layers are named here because those that a model class names need not exist in this checkpoint.
    """
    names = sorted({type(layer).__name__ for layer in layers_of(model)})
    arguments.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(names)
    if arguments.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        arguments.fsdp_plugin_args["mixed_precision_policy"] = policy


def shard_frozen(teacher: Any) -> None:
    """Shard the layers of a frozen teacher over all processes; each is gathered when it runs, and dropped again.

    Embedding, projector and LM head are not sharded: the losses read them outside of the model's forward.
    """
    language = language_model_of(teacher)
    for layer in layers_of(language) + tower_layers_of(teacher):
        if next(layer.parameters(), None) is not None:  # a hollow tower's layers have none
            fully_shard(layer)
    # Sharding the enclosing model as well prefetches its layers. A vision tower is not sharded: transformers looks up
    # its hidden states by the name of its class, which sharding changes.
    sharded = {id(parameter) for layer in layers_of(language) for parameter in layer.parameters()}
    fully_shard(language, ignored_params={p for p in language.parameters() if id(p) not in sharded})
