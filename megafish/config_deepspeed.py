"""What may stand under `engine.deepspeed`: DeepSpeed's own keys, but no second place for a setting of ours, and nothing
that the chosen ZeRO stage would accept and ignore."""

from __future__ import annotations

from typing import Any

REDUCE_BUCKET = 200_000_000
"""Gradients that ZeRO sends at one time, at most. DeepSpeed's 5e8 takes 1 to 2 GB of a GPU for any model."""

# DeepSpeed's keys that repeat a setting of ours: two places for one number would let them disagree.
_OURS = {
    "train_batch_size": "set train.global_batch_size instead",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size instead",
    "gradient_accumulation_steps": "set train.global_batch_size and train.micro_batch_size instead",
    "gradient_clipping": "set optimizer.grad_clip instead",
    "optimizer": "set the optimizer section instead",
    "scheduler": "set the schedule section instead",
    "bf16": "set train.precision instead",
    "bfloat16": "set train.precision instead",
    "fp16": "set train.precision instead",
    "data_types": "set train.precision; gradients are accumulated in fp32 instead",
    "communication_data_type": "set train.precision; gradients are sent in fp32 instead",
    "tensor_parallel": "set engine.tensor_parallel instead",
    "sequence_parallel_size": "set engine.sequence_parallel instead",
    "zero_optimization.stage": "set engine.zero_stage instead",
    "zero_optimization.compute_grad_norm": "the gradient norm is always reported",
    "zero_optimization.cpu_offload": "set engine.offload_optimizer instead",
    "zero_optimization.cpu_offload_param": "set engine.offload_parameters instead",
    "zero_optimization.cpu_offload_use_pin_memory": "pinned memory is used with a GPU",
}
# Keys of zero_optimization: the stages in which they do something. DeepSpeed takes them at any stage.
_STAGES = {
    **dict.fromkeys(
        (
            "sub_group_size",
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
            "memory_efficient_linear",
            "override_module_apply",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
            "leaf_module",
        ),
        (3,),
    ),
    **dict.fromkeys(
        (
            "allgather_partitions",
            "allgather_bucket_size",
            "round_robin_gradients",
            "parameter_alignment",
            "use_multi_rank_bucket_allreduce",
        ),
        (1, 2),
    ),
    **dict.fromkeys(
        ("overlap_comm", "reduce_bucket_size", "contiguous_gradients", "reduce_scatter", "zenflow"), (1, 2, 3)
    ),
}


def complaints(keys: dict[str, Any], stage: int, offload: dict[str, str]) -> list[str]:
    """What is wrong with `engine.deepspeed` at this ZeRO stage, one phrase each.

    offload: section of zero_optimization (offload_optimizer, offload_param) -> the setting of ours, as `name=value`.
    """
    zero = keys.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    given = {*keys, *(f"zero_optimization.{key}" for key in zero)}
    if twice := [f"{key} ({reason})" for key, reason in _OURS.items() if key in given]:
        return [f"may not hold {', '.join(twice)}"]
    found = []
    for key in zero:
        stages = _STAGES.get(key.removeprefix("stage3_"), (1, 2, 3))
        if key.startswith("stage3_"):
            stages = (3,)
        if stage not in stages:
            wanted = " or ".join(map(str, stages))
            found.append(
                f"zero_optimization.{key} has no effect at engine.zero_stage={stage}: set engine.zero_stage={wanted}"
            )
    for section, setting in offload.items():
        inner = zero.get(section)
        name, _, value = setting.partition("=")
        if inner is None:
            continue
        has_device = isinstance(inner, dict) and "device" in inner
        if has_device and value != "none":
            found.append(f"zero_optimization.{section}.device is given beside {setting}: keep one of the two")
        elif not has_device and value == "none":
            found.append(f"zero_optimization.{section} has no effect without {name}=cpu or a device of its own")
    return found
