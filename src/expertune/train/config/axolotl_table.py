"""Axolotl's keys that expertune does not have: taken with a note, taken at one value, or refused with a reason."""

from __future__ import annotations

from types import MappingProxyType

_FUSED = (
    "not used: expertune's own expert kernels are chosen by experts_implementation; the other layers stay as they are"
)
_LOSS = "not used: TRL computes the loss in chunks, so the logits of all tokens are never held at once"
_PREPARED = "not used: data are read and checked at every start, and nothing has to be prepared"
_CLASSES = "not used: Transformers finds the classes from the model's own files"

TAKEN_WITH_NOTE = MappingProxyType(
    {
        "use_kernels": _FUSED,
        "lora_qkv_kernel": _FUSED,
        "lora_o_kernel": _FUSED,
        "lora_mlp_kernel": _FUSED,
        "lora_embedding_kernel": _FUSED,
        "fused_attn_kernel": _FUSED,
        "flash_attn_fuse_mlp": _FUSED,
        "liger_rope": _FUSED,
        "liger_rms_norm": _FUSED,
        "liger_rms_norm_gated": _FUSED,
        "liger_layer_norm": _FUSED,
        "liger_swiglu": _FUSED,
        "liger_glu_activation": _FUSED,
        "liger_kernel_impl": _FUSED,
        "liger_cross_entropy": _LOSS,
        "liger_fused_linear_cross_entropy": _LOSS,
        "cut_cross_entropy": _LOSS,
        "chunked_cross_entropy": _LOSS,
        "chunked_cross_entropy_num_chunks": _LOSS,
        "flash_attn_cross_entropy": _LOSS,
        "dataset_prepared_path": _PREPARED,
        "dataset_processes": "not used: say dataset_num_proc",
        "dataset_keep_in_memory": _PREPARED,
        "num_dataset_shards_to_save": _PREPARED,
        "skip_prepare_dataset": _PREPARED,
        "sample_packing_bin_size": "not used: TRL packs with its own settings",
        "sample_packing_group_size": "not used: TRL packs with its own settings",
        "sample_packing_eff_est": "not used: TRL packs with its own settings",
        "multipack_real_batches": "not used: TRL packs with its own settings",
        "total_num_tokens": "not used: tokens are counted at every start",
        "strict": "not used: a key that is not known is always an error",
        "model_type": _CLASSES,
        "type_of_model": _CLASSES,
        "tokenizer_type": _CLASSES,
        "tokenizer_use_fast": _CLASSES,
        "base_model_config": _CLASSES,
        "is_falcon_derived_model": _CLASSES,
        "is_llama_derived_model": _CLASSES,
        "is_mistral_derived_model": _CLASSES,
        "is_qwen_derived_model": _CLASSES,
        "low_cpu_mem_usage": "not used: Transformers always loads weights this way",
        "include_tokens_per_second": "not used: tokens/s are always logged",
        "include_tkps": "not used: tokens/s are always logged",
        "axolotl_config_path": "not used: it is a note of Axolotl's to itself",
    }
)
"""Keys that only turn on something of Axolotl's own. What happens instead."""

PLUGINS_WITH_NOTE = MappingProxyType(
    {
        "axolotl.integrations.kernels.KernelsPlugin": _FUSED,
        "axolotl.integrations.liger.LigerPlugin": "not used: expertune's experts have kernels of their own",
        "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin": _LOSS,
        "axolotl.integrations.expert_parallel.ExpertParallelPlugin": "not used: expert_parallel_size decides by itself",
    }
)

REFUSED_PLUGINS = MappingProxyType(
    {
        "densemixer": "it changes how experts are trained",
        "diffusion": "it trains another kind of model",
        "grokfast": "it changes the gradients",
        "hatchery": "it trains on a remote service",
        "kd": "it trains on a teacher's outputs",
        "llm_compressor": "it compresses the model",
        "lm_eval": "it runs benchmarks: run them on the merged model (`expertune merge`)",
        "mora": "it is another kind of adapter",
        "nemo_gym": "it trains with rewards",
        "spectrum": "it trains chosen layers in full",
        "swanlab": "say report_to: [swanlab] instead",
    }
)
"""Axolotl's integrations that change what is trained, by their name in `axolotl.integrations`."""

SAME_AS_HERE = MappingProxyType(
    {
        "shuffle_merged_datasets": True,
        "save_safetensors": True,
        "pretrain_multipack_attn": True,
        "tiled_mlp_use_original_mlp": True,
        "tokenizer_save_jinja_files": True,
        "experimental_skip_move_to_device": True,
        "device_map": "auto",
        "hf_use_auth_token": True,
        "eval_causal_lm_metrics": [],
        "merge_method": "memory_efficient",
        "datasets[].roles_to_train": ["assistant"],
        "datasets[].train_on_eos": "turn",
        "datasets[].train_on_eot": "turn",
        "datasets[].chat_template": "tokenizer_default",
    }
)
"""Keys whose one value says what expertune does anyway: taken at that value, refused at any other."""

_MULTI_GPU = "several GPUs are used by expert_parallel_size, dp_shard_size and dp_replicate_size alone; remove it"
_OTHER_AXES = (
    "several GPUs divide experts, weights and batches (expert_parallel_size, dp_shard_size, dp_replicate_size), not a "
    "sequence or a matrix; remove it"
)
_QUANTISED = "quantised base models are not part of this version; remove it and load in bf16"
_PREFERENCE = "expertune does supervised fine-tuning only"
_FULL = "expertune trains adapters only"
_NEW_TOKENS = "new tokens need new embeddings, which are not trained in this version; use tokens the vocabulary has"
_SHARDS = "every row is used; choose rows with datasets[].split, such as train[:1000]"
_BEST = "the newest checkpoint is the one that counts in this version; compare eval_loss in the log"

REASONS = MappingProxyType(
    {
        "load_in_4bit": _QUANTISED,
        "load_in_8bit": _QUANTISED,
        "gptq": _QUANTISED,
        "bnb_config_kwargs": _QUANTISED,
        "quantize_moe_experts": _QUANTISED,
        "model_quantization_config": _QUANTISED,
        "nonexpert_quantization": _QUANTISED,
        "qlora_sharded_model_loading": _QUANTISED,
        "qat": _QUANTISED,
        "quantization": _QUANTISED,
        "fp8": "8-bit computation is not part of this version; use bf16: true",
        "bfloat16": "it is spelt bf16: true here",
        "float16": "it is spelt fp16: true here",
        "float32": "float32 is what bf16: false and fp16: false give",
        "deepspeed": _MULTI_GPU,
        "fsdp": _MULTI_GPU,
        "fsdp_version": _MULTI_GPU,
        "fsdp_final_state_dict_type": _MULTI_GPU,
        "ddp": _MULTI_GPU,
        "ddp_find_unused_parameters": _MULTI_GPU,
        "tensor_parallel_size": _OTHER_AXES,
        "sequence_parallel_degree": _OTHER_AXES,
        "context_parallel_size": _OTHER_AXES,
        "device_map": "the model goes to the GPU if there is one, otherwise to the CPU; remove it",
        "rl": _PREFERENCE,
        "trl": _PREFERENCE,
        "vllm": _PREFERENCE,
        "reward_model": _PREFERENCE,
        "process_reward_model": _PREFERENCE,
        "rl_beta": _PREFERENCE,
        "unfrozen_parameters": f"{_FULL}; name modules to train in full in lora_modules_to_save",
        "relora": "adapters are not merged while they train; use lora",
        "lisa_n_layers": _FULL,
        "peft_use_dora": "PEFT has no DoRA for expert parameters; peft_use_rslora: true works",
        "lora_fan_in_fan_out": "PEFT sets it by itself from the layer; remove it",
        "lora_rank_pattern": "every layer has the one rank lora_r; choose layers with lora_target_modules",
        "lora_alpha_pattern": "every layer has the one lora_alpha; choose layers with lora_target_modules",
        "peft_layers_to_transform": "every layer is adapted; a regular expression in lora_target_modules can choose",
        "lora_on_cpu": "the adapter is where the model is; remove it",
        "loraplus_lr_ratio": "both halves of the adapter have the one learning_rate",
        "embedding_lr": "everything has the one learning_rate",
        "lr_groups": "everything has the one learning_rate",
        "cosine_min_lr_ratio": "say lr_scheduler: cosine_with_min_lr and lr_scheduler_kwargs: {min_lr_rate: 0.1}",
        "cosine_constant_lr_ratio": "say lr_scheduler: warmup_stable_decay with lr_scheduler_kwargs",
        "optim_args": "give adam_beta1, adam_beta2, adam_epsilon and weight_decay",
        "batch_size": "give micro_batch_size and gradient_accumulation_steps",
        "auto_find_batch_size": "give micro_batch_size",
        "group_by_length": "use sample_packing: true, which wastes less",
        "batch_flattening": "use sample_packing: true",
        "eval_sequence_len": "held-out rows have sequence_len too",
        "min_sample_len": "every row is used, however short",
        "pad_to_multiple_of": "use pad_to_sequence_len: true, or nothing",
        "curriculum_sampling": "rows are shuffled with seed",
        "shuffle_merged_datasets": "rows are always shuffled with seed",
        "shuffle_before_merging_datasets": "rows are shuffled with seed after merging",
        "streaming": "data are read before training starts, so that a bad row is found then",
        "pretraining_dataset": "use datasets with type: completion",
        "dataset_exact_deduplication": "duplicates are counted and reported, not removed",
        "dataset_shard_num": _SHARDS,
        "dataset_shard_idx": _SHARDS,
        "push_dataset_to_hub": "nothing is uploaded",
        "tokens": _NEW_TOKENS,
        "added_tokens_overrides": _NEW_TOKENS,
        "resize_token_embeddings_to_32x": _NEW_TOKENS,
        "fix_untrained_tokens": _NEW_TOKENS,
        "default_system_message": "put a system message into the data, or a default into chat_template_jinja",
        "chat_template_kwargs": "put the choice into chat_template_jinja",
        "overrides_of_model_config": "edit config.json in the model's folder",
        "model_config": "edit config.json in the model's folder",
        "model_kwargs": "the model is loaded with the keys of this file only",
        "model_revision": "download that revision and give its folder as base_model",
        "revision_of_model": "download that revision and give its folder as base_model",
        "processor_type": "only text models are trained",
        "xformers_attention": "use attn_implementation: sdpa",
        "sage_attention": "use attn_implementation: sdpa",
        "expert_backend": "it is spelt experts_implementation here",
        "evaluation_strategy": "it is spelt eval_strategy here",
        "noisy_embedding_alpha": "it is spelt neftune_noise_alpha here",
        "max_packed_sequence_len": "it is spelt sequence_len here, with sample_packing: true",
        "generate_samples": "give sample_prompts, answered before and after training",
        "num_generation_samples": "give sample_prompts, answered before and after training",
        "generation_max_new_tokens": "it is spelt sample_max_new_tokens here",
        "load_best_model_at_end": _BEST,
        "metric_for_best_model": _BEST,
        "greater_is_better": _BEST,
        "early_stopping_patience": _BEST,
        "save_only_model": "a checkpoint without its optimizer could not be resumed",
        "save_first_step": "the first checkpoint is at save_steps",
        "save_safetensors": "adapters are always saved as safetensors",
        "hub_model_id": "nothing is uploaded; run `hf upload` on the adapter's folder",
        "hub_strategy": "nothing is uploaded; run `hf upload` on the adapter's folder",
        "use_mlflow": "say report_to: [mlflow], and set MLFLOW_* in the environment",
        "use_comet": "say report_to: [comet_ml], and set COMET_* in the environment",
        "use_trackio": "say report_to: [trackio]",
        "use_swanlab": "say report_to: [swanlab]",
        "use_ray": _MULTI_GPU,
        "layer_offloading": "use activation_offloading: true or gradient_checkpointing: true",
        "selective_checkpointing": "use gradient_checkpointing: true",
        "tiled_mlp": "use gradient_checkpointing: true",
        "torch_compile_options": "use torch_compile_mode",
        "merge_lora": "run `expertune merge` after training",
        "datasets[].chat_template": "one template serves the run: set chat_template beside datasets",
        "datasets[].chat_template_jinja": "one template serves the run: set chat_template_jinja beside datasets",
        "datasets[].roles_to_train": "the assistant's turns are trained, or everything with train_on_inputs: true",
        "datasets[].train_on_eos": "the chat template's {% generation %} marks decide what is trained",
        "datasets[].train_on_eot": "the chat template's {% generation %} marks decide what is trained",
        "datasets[].conversation": "use type: chat_template",
        "datasets[].shards": _SHARDS,
        "datasets[].field_human": "use type: prompt_completion or alpaca",
        "datasets[].field_model": "use type: prompt_completion or alpaca",
        "datasets[].system_prompt": "use type: chat_template with a system message in the data",
        "datasets[].trust_remote_code": "data sets that run code are not loaded; convert them to jsonl or parquet",
    }
)
"""Why a key of Axolotl's is not supported, and the way out."""

OTHER_NAMES = MappingProxyType(
    {
        "model": "base_model",
        "model_name_or_path": "base_model",
        "tokenizer": "tokenizer_config",
        "dataset": "datasets",
        "train_datasets": "datasets",
        "eval_datasets": "test_datasets",
        "max_seq_length": "sequence_len",
        "max_seq_len": "sequence_len",
        "lora_rank": "lora_r",
        "rank": "lora_r",
        "r": "lora_r",
        "alpha": "lora_alpha",
        "target_modules": "lora_target_modules",
        "target_parameters": "lora_target_parameters",
        "modules_to_save": "lora_modules_to_save",
        "use_rslora": "peft_use_rslora",
        "lr": "learning_rate",
        "epochs": "num_epochs",
        "tensorboard": "use_tensorboard",
        "moe_backend": "experts_implementation",
        "flash_attn": "flash_attention",
        "output": "output_dir",
    }
)
"""Names that other trainers use."""
