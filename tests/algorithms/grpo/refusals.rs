//! Settings that others leave without a meaning are refused by name.

use warpo::Error;

use crate::support::losses::build;

#[test]
fn a_wrong_setting_is_a_wrong_configuration() {
    for (name, pairs, want) in [
        (
            "grpo",
            &["samples_per_prompt=1"][..],
            "config key `samples_per_prompt`: got 1, wanted 2 or more: the advantage is against the \
             samples of the prompt",
        ),
        (
            "grpo",
            &["samples_per_prompt=2", "advantage=leave_one_out_std"],
            "config key `samples_per_prompt`: got 2, wanted 3 or more: the advantage is against the \
             samples of the prompt",
        ),
        (
            "grpo",
            &["policy_loss=sapo", "dual_clip=3"],
            "config key `dual_clip`: got 3.0, wanted \"none\": the loss \"sapo\" does not read it",
        ),
        (
            "grpo",
            &["policy_loss=gmpo", "ratio=sequence"],
            "config key `ratio`: got \"sequence\", wanted \"token\": the loss \"gmpo\" does not \
             read it",
        ),
        (
            "ppo",
            &["vespo_k_pos=1"],
            "config key `vespo_k_pos`: got 1.0, wanted 2.0: the loss \"clip\" does not read it",
        ),
        (
            "rloo",
            &["aggregation_tokens=7"],
            "config key `aggregation_tokens`: got 7, wanted \"none\": aggregation \"sequences\" does \
             not read it",
        ),
        (
            "rloo",
            &["kl_weight=one"],
            "config key `kl_weight`: got \"one\", wanted \"ratio\": kl_in \"reward\" does not read it",
        ),
        (
            "grpo",
            &["kl_target=1"],
            "config key `kl_target`: got 1.0, wanted \"none\": kl_coef 0 does not read it",
        ),
        (
            "grpo",
            &["overlong_coef=2"],
            "config key `overlong_coef`: got 2.0, wanted 1.0: overlong_share 0 does not read it",
        ),
        (
            "grpo",
            &["overlong_share=1.5"],
            "config key `overlong_share`: got 1.5, wanted from 0 to 1",
        ),
        (
            "reinforce++",
            &["normalize_advantages=true"],
            "config key `normalize_advantages`: got true, wanted false: the advantage is one of \
             tokens; whiten_advantages is for these",
        ),
        (
            "reinforce++",
            &["dynamic_sampling=3"],
            "config key `samples_per_prompt`: got 1, wanted 2 or more: dynamic_sampling compares \
             the samples of a prompt",
        ),
        (
            "grpo",
            &["dynamic_sampling=1"],
            "config key `dynamic_sampling`: got 1, wanted 0, or 2 or more",
        ),
        (
            "grpo",
            &["dynamic_reward=math"],
            "config key `dynamic_reward`: got math, wanted \"none\": dynamic_sampling is 0",
        ),
        (
            "grpo",
            &["dynamic_reward=math", "dynamic_sampling=5"],
            "config key `dynamic_reward`: got math, wanted the name of one of the rewards ()",
        ),
        ("grpo", &["grpo_epochs=0"], "config key `grpo_epochs`: got 0, wanted 1 or more"),
    ] {
        let pairs = [&["reward_model=judge"], pairs].concat();
        let error = build(name, &pairs).map(drop).unwrap_err();
        assert!(matches!(&error, Error::Config { .. }), "{error:?}");
        assert_eq!(error.to_string(), want);
    }
}
