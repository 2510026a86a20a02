//! The ways in which training goes wrong silently, each as a change of one place of the product,
//! and the test that sees it.

/// A mistake, and the test that must fail with it.
pub struct Bug {
    /// What goes wrong; others made each of these mistakes.
    pub what: &'static str,
    pub file: &'static str,
    /// Text that `file` has once; what stands between `«` and `»` is replaced: an expression, in
    /// CUDA any text.
    pub place: &'static str,
    pub mistake: &'static str,
    pub test: &'static str,
}

pub const BUGS: &[Bug] = &[
    Bug {
        what: "the token that ends a sample is masked as if it were padding",
        file: "src/train/source.rs",
        place: "let new = from..«s.ids.len()»;",
        mistake: "s.ids.len() - usize::from(c.stopped)",
        test: "train::rollouts::masks_come_from_lengths",
    },
    Bug {
        what: "sequences count as long as the longest: padding is part of a response",
        file: "src/train/source.rs",
        place: "end += if by_token { «s.tokens()» } else { 1 };",
        mistake: "self.sequences.iter().map(Sequence::tokens).max().unwrap_or(0)",
        test: "train::rollouts::masks_come_from_lengths",
    },
    Bug {
        what: "the score lands on a token after the last",
        file: "src/algorithms/policy_gradient.rs",
        place: "if «t + 1 == end» {",
        mistake: "t == end",
        test: "algorithms::ppo::rewards_are_scores_and_kl",
    },
    Bug {
        what: "log-probs are those of the token before",
        file: "src/models/batch.rs",
        place: "self.targets.push(«ids[t]»);",
        mistake: "ids[t - 1]",
        test: "models::golden::logprobs_and_entropy_are_those_of_hugging_face",
    },
    Bug {
        what: "positions go on over what stands left of a sequence",
        file: "src/models/batch.rs",
        place: "self.positions.extend((first..first + ids.len()).map(|p| «p as u32»));",
        mistake: "p as u32 + u32::from(at > 0)",
        test: "rollout::score::rows_do_not_see_their_batch",
    },
    Bug {
        what: "packed texts share the memory of keys and values",
        file: "src/models/batch.rs",
        place: "list.extend(«next»..next + used);",
        mistake: "0",
        test: "rollout::score::a_document_does_not_see_its_neighbours",
    },
    Bug {
        what: "a micro-batch's loss is its own mean",
        file: "src/algorithms/policy_gradient.rs",
        place: "let total = loss.denominator(«count», c.sequences(), sampling.max_new_tokens);",
        mistake: "micro.tokens().len()",
        test: "algorithms::ppo::whole_step_denominators",
    },
    Bug {
        what: "advantages are whitened by one sequence",
        file: "src/algorithms/ppo.rs",
        place: "Moments::of(dev, «View::from(&c.advantages)»)",
        mistake: "View::from(&c.advantages).range(c.span(&(0..1)))",
        test: "algorithms::ppo::order_and_repetition_do_not_change_the_mean",
    },
    Bug {
        what: "NaN times a mask of 0 is NaN",
        file: "src/ops/attention/cpu.rs",
        place: "ds[j] = if «seen» { (ds[j] - delta) * slope } else { F::ZERO };",
        mistake: "true",
        test: "ops::attention::a_nan_of_later_tokens_stays_out_of_gradients",
    },
    Bug {
        what: "the temperature of sampling is none of training's",
        file: "src/train/trainer.rs",
        place: "let pass = if lm { pass.at(«inputs.needs.temperature()») } else { pass };",
        mistake: "1.0",
        test: "train::run::rollout_equals_training_when_nothing_is_learned",
    },
    Bug {
        what: "old log-probs went through bf16: the first ratio is not 1",
        file: "src/train/source.rs",
        place: "«self.columns.old_logp.extend(c.logprobs)»;",
        mistake: "self.columns.old_logp.extend(\
                  c.logprobs.iter().map(|p| half::bf16::from_f32(*p).to_f32()))",
        test: "train::run::rollout_equals_training_when_nothing_is_learned",
    },
    Bug {
        what: "generation computes in other numbers than training",
        file: "src/models/heads.rs",
        place: "settings(model.spec(), Some(<T::Acc as Element>::of(«t»)));",
        mistake: "t * (1.0 + 1e-6)",
        test: "rollout::engine::rollout_equals_training",
    },
    Bug {
        what: "prompts get each other's completions",
        file: "src/train/source.rs",
        place: "self.sequences.iter_mut().zip(«completions»)",
        mistake: "completions.into_iter().rev().collect()",
        test: "train::source::prompts_are_repeated_and_continued",
    },
    Bug {
        what: "generation goes on with the weights before an update",
        file: "src/train/models.rs",
        place: "«self.model.repack(dev)?»;\n        grad_norm::first_bad",
        mistake: "()",
        test: "train::models::the_trainer_takes_the_steps_of_torch",
    },
    Bug {
        what: "the cache's key is not all that its content depends on",
        file: "src/rollout/engine.rs",
        place: "live.iter().find(|s| *share && «prompts[s.index].ids == *ids»);",
        mistake: "prompts[s.index].ids.len() == ids.len()",
        test: "rollout::engine::prompts_that_differ_share_no_pages",
    },
    Bug {
        what: "a text that goes on is encoded as one that begins: a space more a turn",
        file: "src/data/tokenizer.rs",
        place: "let Some(anchor) = «&self.anchor» else { return whole() };",
        mistake: "&None",
        test: "data::tokenizer::a_completion_continues_its_prompt",
    },
    Bug {
        what: "BOS stands there twice",
        file: "src/data/tokenizer.rs",
        place: "let mut ids = «self.encode_part(text, room, kept)?»;",
        mistake: "self.raw(text, true)?",
        test: "data::tokenizer::bos_stands_once_at_the_start",
    },
    Bug {
        what: "the gradient of the KL term has mean 0",
        file: "src/ops/policy_loss.rs",
        place: "KlWeight::Ratio => (own_ratio * k, «own_ratio * (dk + k)»),",
        mistake: "own_ratio * dk",
        test: "ops::kl::in_the_loss_the_mean_gradient_is_the_exact_one",
    },
    Bug {
        what: "the gradient of the policy is 0",
        file: "src/ops/policy_loss.rs",
        place: "return «(free, free)»;",
        mistake: "(free, 0.0)",
        test: "algorithms::ppo::ppo_learns_a_bandit",
    },
    Bug {
        what: "weights are kept in bf16, which swallows small updates",
        file: "src/ops/adamw.rs",
        place: "p[i] = «p[i] * k.keep - k.step * m[i] / denominator»;",
        // f64 is the test's truth, which is no more exact than the code.
        mistake: "{
            let p = p[i] * k.keep - k.step * m[i] / denominator;
            if size_of::<F>() == 8 { p } else { F::of(bf16::of(p.f64()).f64()) }
        }",
        test: "ops::adamw::small_steps_are_not_lost",
    },
    Bug {
        what: "the reference has the weights of another model",
        file: "src/train/models.rs",
        place: "n.reference.then_some(«Origin::Model»)",
        mistake: "Origin::RewardModel",
        test: "train::run::rollout_equals_training_when_nothing_is_learned",
    },
    Bug {
        what: "the reference's log-probs are added to the policy's",
        file: "src/ops/sequence_loss.rs",
        place: "sums.ratio += self.weight(t) * («logp - reference»);",
        mistake: "logp + reference",
        test: "algorithms::preference::only_the_ratio_to_the_reference_counts",
    },
    Bug {
        what: "the prompt counts as part of the completion that people chose",
        file: "src/data/dataset/maker.rs",
        place: "let end = «prompt.len().max(1)»..ids.len();",
        mistake: "1",
        test: "algorithms::preference::completions_count_and_prompts_do_not",
    },
    Bug {
        what: "a resumed run begins with new moments",
        file: "src/train/run.rs",
        place: "«t.dev.write(to.flat_mut(), &numbers)?»;",
        mistake: "()",
        test: "train::run::sft_resumes_at_every_step",
    },
    Bug {
        what: "a checkpoint's files are not on the disk when it gets its name",
        file: "src/train/checkpoint/format.rs",
        place: "«run(\"sync\", path, || writer.file.sync())?»;",
        mistake: "()",
        test: "train::checkpoint::a_crash_at_any_point_loses_at_most_the_last_interval",
    },
    Bug {
        what: "a warp writes shared memory that others still read",
        file: "kernels/gae.cu",
        place: "before all have read it.\n        «__syncthreads();»",
        mistake: "",
        test: "ops::gae::kernels_are_as_exact_as_plain_ones",
    },
    Bug {
        what: "scratch that nobody has set is added to",
        file: "src/ops/logprob/cpu.rs",
        place: "Product::new((rows, d, n), Lhs::rows(dz, width), rhs).continuing(«v0 > 0»),",
        mistake: "true",
        test: "models::golden::sft_loss_and_gradients_are_those_of_hugging_face",
    },
];
