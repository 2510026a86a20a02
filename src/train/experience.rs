//! Where a step's samples come from: prompts continued by the policy, and judged by the other
//! models.

use std::{ops::Range, time::Instant};

use super::{
    Observer, Trainer,
    feed::{Examples, Sequence},
    rollouts::Rollout,
    signals,
};
use crate::{
    algorithms::Columns,
    device::{Device, Element},
    error::{Error, Result},
    models::{Batch, Pass},
    ops::grad_norm,
    rng::{Purpose, Stream},
    rollout::{Completion, Prompt, Settings as Generation},
};

impl<T: Element<Acc = f32>> Trainer<T> {
    /// Continues prompts, and fills the columns that need a model.
    pub(super) fn roll_out(
        &mut self,
        chosen: &[usize],
        base: u64,
        seen: &mut dyn Observer,
    ) -> Result<(Vec<Sequence>, Columns<f32>)> {
        let (Examples::Prompts(all), Some(sampling)) = (&self.job.examples, self.sampling()) else {
            return Err(Error::value("data of an algorithm that samples", "prompts", "others"));
        };
        let per = sampling.samples_per_prompt;
        let prompts: Vec<Prompt> = chosen
            .iter()
            .flat_map(|i| std::iter::repeat_n(&all[*i], per))
            .zip(base..)
            .map(|(p, sample)| Prompt { sample, ids: p.ids.clone() })
            .collect();
        let start = Instant::now();
        let completions = self.generate(&prompts, seen)?;
        self.clock.push(("sample", start.elapsed().as_secs_f64()));
        let start = Instant::now();
        let mut columns = Columns { offsets: vec![0], ..Columns::default() };
        let mut sequences = Vec::with_capacity(prompts.len());
        for (p, c) in prompts.iter().zip(&completions) {
            let ids = [&p.ids[..], &c.ids].concat();
            let learn = p.ids.len()..ids.len();
            sequences.push(Sequence { predicted: vec![learn], ids });
            columns.old_logp.extend_from_slice(&c.logprobs);
            columns.offsets.push(columns.old_logp.len() as u32);
            columns.samples.push(p.sample);
            columns.stopped.push(c.stopped);
            self.rollouts.push(Rollout::new(self.step + 1, p, c));
        }
        seen.phase("score", 0, 1);
        self.score(&sequences, &mut columns)?;
        check_columns(&self.host, &columns, self.step + 1)?;
        self.clock.push(("score", start.elapsed().as_secs_f64()));
        Ok((sequences, columns))
    }

    fn generate(
        &mut self,
        prompts: &[Prompt],
        seen: &mut dyn Observer,
    ) -> Result<Vec<Completion<f32>>> {
        let (Some(policy), Some(sampling)) = (&self.policy, self.sampling()) else {
            return Err(Error::value("an algorithm that samples", "a policy", "none"));
        };
        let _phase = self.dev.span("sample");
        let generator = self.job.work.generator();
        let settings = Generation {
            sampling: sampling.params,
            max_new_tokens: sampling.max_new_tokens,
            stop_ids: self.job.eos.iter().chain(&self.job.settings.stop_ids).copied().collect(),
            stream: Stream {
                seed: self.job.settings.seed,
                step: self.step,
                purpose: Purpose::Sample,
            },
        };
        let total = prompts.len() * settings.max_new_tokens;
        let mut made = 0;
        let scope = self.arena.scope();
        generator.run(&self.dev, &policy.model, &scope, prompts, &settings, |n| {
            made += n;
            seen.phase("sample", made, total);
            let interrupted = |signal| Err(Error::Interrupted { signal, step: self.step });
            signals::requested().map_or(Ok(()), interrupted)
        })
    }

    /// Reference log-probs, values and scores of the sampled sequences.
    fn score(&mut self, sequences: &[Sequence], c: &mut Columns<f32>) -> Result<()> {
        let _phase = self.dev.span("score");
        let (scorer, dev, t) = (self.job.work.scorer(), &self.dev, self.temperature());
        let groups = scorer.groups(sequences.iter().map(|s| s.ids.len()));
        let (arena, batch) = (&mut self.arena, &mut self.batch);
        let tokens = |batch: &mut Batch, group: &Range<usize>| {
            batch.clear();
            sequences[group.clone()].iter().for_each(|s| batch.push_masked(&s.ids, &s.predicted));
        };
        // Offloaded weights come into the memory of gradients, which are of the last step.
        let Some(policy) = &mut self.policy else { return Ok(()) };
        if let Some(model) = &mut self.reference {
            model.with_loaded(dev, &mut policy.grads, |model| {
                groups.iter().try_for_each(|group| {
                    tokens(batch, group);
                    let scope = arena.scope();
                    Pass::new(dev, model, &scope, batch).at(t).score(&mut c.ref_logp, None)
                })
            })?;
        }
        if let Some(role) = &self.scalar {
            for group in &groups {
                tokens(batch, group);
                let scope = arena.scope();
                Pass::new(dev, &role.model, &scope, batch).score(&mut c.old_values, None)?;
            }
        }
        if let Some(model) = &mut self.reward_model {
            model.with_loaded(dev, &mut policy.grads, |model| {
                groups.iter().try_for_each(|group| {
                    batch.clear();
                    sequences[group.clone()].iter().for_each(|s| batch.push_last(&s.ids));
                    let scope = arena.scope();
                    Pass::new(dev, model, &scope, batch).score(&mut c.scores, None)
                })
            })?;
        }
        Ok(())
    }

    /// Writes scores, values and advantages into the records of the step.
    pub(super) fn finish_rollouts(&mut self, c: &Columns<f32>) {
        for (s, r) in self.rollouts.iter_mut().enumerate() {
            r.fill(c, s, self.job.tokenizer.as_ref());
        }
    }
}

/// Property 9 for what a step is made of, before clipping hides a bad number or whitening spreads
/// it over all samples.
fn check_columns(dev: &Device, c: &Columns<f32>, step: u64) -> Result<()> {
    for (what, x) in [
        ("the sampled log-prob", &c.old_logp),
        ("the reference log-prob", &c.ref_logp),
        ("the value", &c.old_values),
        ("the score", &c.scores),
    ] {
        let Some(i) = grad_norm::first_bad(dev, x.into())?.get()? else { continue };
        // scores are by sequence, all else by token
        let s = if what == "the score" { i } else { c.sequence_of(i) };
        let samples = c.samples.get(s).copied().into_iter().collect();
        return Err(Error::BadNumber {
            step,
            what: what.into(),
            value: f64::from(x[i]),
            samples,
            places: Vec::new(),
        });
    }
    Ok(())
}
