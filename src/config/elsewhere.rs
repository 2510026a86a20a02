//! Names of settings in TRL, the Hugging Face Trainer, OpenRLHF, verl and LLaMA-Factory.

/// The setting here of a name elsewhere: the whole name, or the end of a dotted one. `known` tells
/// the settings of the algorithm, of which a name may mean one or another.
pub fn ours(key: &str, known: impl Fn(&str) -> bool) -> Option<&'static str> {
    let key = key.replace('-', "_");
    let is = |theirs: &str| {
        key.strip_suffix(theirs).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let all = NAMES.iter().flat_map(|(ours, theirs)| theirs.iter().map(move |t| (*ours, *t)));
    let found = all.filter(|(ours, theirs)| known(ours) && is(theirs));
    // The longest says most.
    found.max_by_key(|(_, theirs)| theirs.len()).map(|(ours, _)| ours)
}

/// Settings here, and what they are called elsewhere.
pub const NAMES: &[(&str, &[&str])] = &[
    (
        "model",
        &[
            "model_name_or_path",
            "sft_model_path",
            "pretrain",
            "model.path",
            "actor_model",
            "base_model",
            "model_name",
            "pretrained_model_name_or_path",
            "partial_pretrain",
        ],
    ),
    (
        "data",
        &[
            "train_file",
            "dataset_name",
            "dataset",
            "train_files",
            "prompt_data",
            "train_dataset",
            "dataset_dir",
            "data_path",
            "input_data",
        ],
    ),
    ("eval_data", &["eval_dataset", "val_files", "validation_file", "eval_file", "test_file"]),
    (
        "columns",
        &[
            "input_key",
            "output_key",
            "prompt_key",
            "response_key",
            "label_key",
            "chosen_key",
            "rejected_key",
            "dataset_text_field",
        ],
    ),
    ("eval_every", &["eval_steps", "test_freq", "eval_interval", "logging_eval_steps"]),
    ("out", &["output_dir", "save_path", "default_local_dir", "ckpt_path", "output_path"]),
    ("device", &["device_map", "device_name", "use_cpu", "no_cuda"]),
    ("threads", &["num_threads", "dataloader_num_workers", "preprocessing_num_workers"]),
    ("seed", &["random_seed", "data_seed", "manual_seed"]),
    (
        "batch_size",
        &[
            "per_device_train_batch_size",
            "train_batch_size",
            "rollout_batch_size",
            "total_batch_size",
            "global_batch_size",
            "generation_batch_size",
        ],
    ),
    ("load_balance", &["router_aux_loss_coef", "aux_loss_coef", "moe_aux_loss_coeff"]),
    (
        "micro_batch_tokens",
        &[
            "gradient_accumulation_steps",
            "micro_train_batch_size",
            "micro_rollout_batch_size",
            "local_rollout_forward_batch_size",
            "ppo_micro_batch_size_per_gpu",
            "ppo_micro_batch_size",
            "log_prob_micro_batch_size_per_gpu",
            "micro_batch_size",
            "micro_batch_size_per_gpu",
            "ppo_max_token_len_per_gpu",
            "train_max_tokens_per_gpu",
            "per_device_eval_batch_size",
            "forward_batch_size",
        ],
    ),
    ("steps", &["max_steps", "total_training_steps", "num_train_steps", "num_steps"]),
    ("epochs", &["num_train_epochs", "max_epochs", "total_epochs", "num_epochs", "num_episodes"]),
    ("shuffle", &["shuffle_dataset", "data.shuffle"]),
    (
        "learning_rate",
        &["lr", "actor_learning_rate", "actor_lr", "policy_lr", "optim.lr", "actor.optim.lr"],
    ),
    ("schedule", &["lr_scheduler_type", "lr_scheduler", "warmup_style", "lr_warmup_style"]),
    (
        "warmup_steps",
        &[
            "warmup_ratio",
            "lr_warmup_steps",
            "lr_warmup_ratio",
            "lr_warmup_steps_ratio",
            "num_warmup_steps",
        ],
    ),
    ("min_learning_rate_ratio", &["min_lr_rate", "min_lr_ratio", "min_lr"]),
    ("weight_decay", &["l2", "wd"]),
    ("beta1", &["adam_beta1", "adam_betas", "betas"]),
    ("beta2", &["adam_beta2"]),
    ("epsilon", &["adam_epsilon", "adam_eps", "eps"]),
    ("max_grad_norm", &["max_norm", "grad_clip", "clip_grad", "gradient_clipping"]),
    (
        "recompute",
        &[
            "gradient_checkpointing",
            "enable_gradient_checkpointing",
            "activation_checkpointing",
            "use_reentrant",
        ],
    ),
    (
        "offload_frozen",
        &["param_offload", "ref_offload", "colocate_all_models", "ref_reward_offload"],
    ),
    (
        "max_length",
        &[
            "max_seq_length",
            "max_len",
            "cutoff_len",
            "model_max_length",
            "max_model_len",
            "max_prompt_length",
            "prompt_max_len",
            "max_seq_len",
            "truncate_prompt_tokens",
        ],
    ),
    ("prompt_tokens", &["query_length", "input_length"]),
    ("eos_id", &["stop_token", "eos_token_id", "eos_token"]),
    ("stop_ids", &["stop_token_id", "stop_token_ids"]),
    ("checkpoint_every", &["save_steps", "save_freq", "save_interval"]),
    ("keep_checkpoints", &["save_total_limit", "max_ckpt_num", "max_actor_ckpt_to_keep"]),
    (
        "samples_per_prompt",
        &[
            "num_generations",
            "n_samples_per_prompt",
            "rollout.n",
            "rloo_k",
            "num_return_sequences",
            "num_samples_per_prompt",
        ],
    ),
    (
        "max_new_tokens",
        &[
            "response_length",
            "max_tokens",
            "generate_max_len",
            "max_completion_length",
            "max_response_length",
            "max_gen_len",
        ],
    ),
    ("temperature", &["sampling_temperature", "rollout.temperature"]),
    ("top_k", &["rollout.top_k"]),
    ("top_p", &["nucleus_p", "rollout.top_p"]),
    ("rollout_slots", &["max_num_seqs", "rollout.max_num_seqs"]),
    (
        "reward_model",
        &[
            "reward_model_path",
            "reward_pretrain",
            "reward_model.model.path",
            "reward_funcs",
            "rm_path",
            "remote_rm_url",
        ],
    ),
    ("reward_clip", &["reward_clip_range", "cliprange_reward", "clip_reward"]),
    ("missing_eos_penalty", &["non_eos_penalty", "penalty_reward_value", "overlong_penalty"]),
    (
        "kl_coef",
        &["init_kl_coef", "beta", "kl_ctl", "kl_ctrl.kl_coef", "kl_loss_coef", "kl_penalty_coef"],
    ),
    ("kl_estimator", &["kl_penalty", "kl_loss_type"]),
    ("kl_in", &["use_kl_loss", "use_kl_in_reward"]),
    ("kl_target", &["target_kl", "kl_ctrl.target_kl"]),
    ("kl_horizon", &["horizon", "kl_ctrl.horizon"]),
    ("clip_range", &["cliprange", "eps_clip", "clip_ratio", "clip_eps", "epsilon_clip"]),
    ("clip_range_high", &["epsilon_high", "clip_ratio_high", "eps_clip_high", "eps_clip_low_high"]),
    ("dual_clip", &["clip_ratio_c", "delta"]),
    ("entropy_coef", &["ent_coef", "entropy_coeff", "entropy_loss_coef"]),
    (
        "minibatches",
        &["num_mini_batches", "mini_batch_size", "ppo_mini_batch_size", "ppo_buffer_size"],
    ),
    ("ppo_epochs", &["num_ppo_epochs", "num_iterations", "actor.ppo_epochs"]),
    ("value_init", &["critic_model", "critic_pretrain", "critic.model.path", "value_model_path"]),
    ("value_clip", &["cliprange_value", "value_clip_range", "critic.cliprange_value"]),
    ("value_coef", &["vf_coef", "value_loss_coef"]),
    ("value_learning_rate", &["critic_learning_rate", "critic_lr", "critic.optim.lr", "value_lr"]),
    ("gamma", &["discount", "algorithm.gamma"]),
    ("lambda", &["lam", "gae_lambda", "algorithm.lam", "lambd"]),
    ("whiten_advantages", &["normalize_advantage", "advantage_whitening", "ppo_whiten_advantages"]),
    ("whiten_rewards", &["ppo_whiten_rewards", "normalize_reward", "use_score_norm"]),
    ("center_coef", &["center_rewards_coefficient"]),
    ("loss_type", &["pref_loss", "dpo_loss_type"]),
    ("beta", &["kl_coef", "pref_beta", "dpo_beta", "orpo_lambda", "simpo_beta", "kto_beta"]),
    ("sft_coef", &["rpo_alpha", "cpo_alpha", "nll_loss_coef", "pref_ftx", "sft_weight"]),
    ("f_divergence", &["f_divergence_type"]),
    ("f_alpha", &["f_alpha_divergence_coef"]),
    ("wpo", &["use_weighting"]),
    ("baseline", &["loss_type"]),
    ("reference_model", &["ref_model", "ref_pretrain", "ref_model_name_or_path", "ref.model.path"]),
    ("gamma_margin", &["simpo_gamma", "gamma_beta_ratio"]),
    (
        "completion_only",
        &["completion_only_loss", "train_on_prompt", "train_on_inputs", "assistant_only_loss"],
    ),
];
