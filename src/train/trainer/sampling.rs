//! The samples of a step: made, scored, and drawn again until they differ.

use std::time::Instant;

use super::{Observer, Trainer, stop};
use crate::{
    algorithms::{GreedySample, Metrics},
    device::Element,
    error::{Error, Result},
    models::Head,
    ops::sample::SamplingParams,
    rng::{Purpose, Stream},
    rollout::{GenerationConfig, rewards::RewardQueue},
    train::{signals, source::StepData},
};

/// Seconds of each phase.
type Seconds = Vec<(&'static str, f64)>;

/// The likeliest token, always.
const GREEDY: SamplingParams =
    SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

impl<T: Element<Acc = f32>> Trainer<T> {
    /// Continues the step's prompts with samples of the policy and scores these; returns how many
    /// prompts were drawn.
    ///
    /// With [`Resampling`](crate::algorithms::Resampling) a prompt whose samples have equal scores
    /// gives way to the next one of the data.
    pub(super) fn samples(
        &mut self,
        data: &mut StepData,
        seen: &mut dyn Observer,
        out: &mut Metrics,
        seconds: &mut Seconds,
    ) -> Result<u64> {
        let needs = &self.inputs.needs;
        let (copies, resampling) =
            (needs.sampling().map_or(1, |s| s.samples_per_prompt), needs.resampling.clone());
        let want = data.sequences.len() / copies;
        let mut drawn = want;
        let Some(resampling) = resampling else {
            self.sample_and_score(data, seen, seconds)?;
            return Ok(drawn as u64);
        };
        // What differs, in the order of the data, and what does not.
        let (mut draws, mut kept, mut flat) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            self.sample_and_score(data, seen, seconds).map_err(|e| data.locate(e))?;
            for group in 0..data.sequences.len() / copies {
                let differs = data.differs(group * copies..(group + 1) * copies, &resampling);
                if differs { &mut kept } else { &mut flat }.push((draws.len(), group));
            }
            draws.push(std::mem::take(data));
            if kept.len() == want || draws.len() == resampling.draws {
                break;
            }
            let lack = want - kept.len();
            *data = self.inputs.source.draw(self.drawn + drawn as u64, lack);
            drawn += lack;
        }
        out.push(("draws", draws.len() as f64));
        out.push(("dropped_groups", (drawn - want) as f64));
        kept.extend(flat.into_iter().take(want - kept.len()));
        for (draw, group) in kept {
            let samples: Vec<usize> = (group * copies..(group + 1) * copies).collect();
            data.extend(&draws[draw], &samples);
        }
        Ok(drawn as u64)
    }

    /// Samples, and scores each sample that ends while others go on and while the models score.
    fn sample_and_score(
        &mut self,
        data: &mut StepData,
        seen: &mut dyn Observer,
        seconds: &mut Seconds,
    ) -> Result<()> {
        let sampling = self.inputs.needs.sampling();
        let (copies, params) = sampling.map_or((1, GREEDY), |s| (s.samples_per_prompt, s.params()));
        if self.inputs.needs.greedy {
            let mut likeliest = StepData::default();
            let first: Vec<usize> = (0..data.sequences.len()).step_by(copies).collect();
            likeliest.extend(data, &first);
            self.sample_and_score_by(GREEDY, &mut likeliest, seen, seconds)?;
            let c = &likeliest.columns;
            let greedy = (0..first.len()).map(|i| GreedySample {
                score: c.scores[i],
                stopped: c.stopped[i],
                tokens: c.span(&(i..i + 1)).len(),
            });
            data.columns.greedy = greedy.flat_map(|g| std::iter::repeat_n(g, copies)).collect();
        }
        self.sample_and_score_by(params, data, seen, seconds)
    }

    fn sample_and_score_by(
        &mut self,
        params: SamplingParams,
        data: &mut StepData,
        seen: &mut dyn Observer,
        seconds: &mut Seconds,
    ) -> Result<()> {
        let mut took = |phase: &'static str, since: Instant| {
            let time = since.elapsed().as_secs_f64();
            match seconds.iter_mut().find(|(name, _)| *name == phase) {
                Some((_, sum)) => *sum += time,
                None => seconds.push((phase, time)),
            }
        };
        // The run's own again below: its processes are kept.
        let mut rewards = std::mem::take(&mut self.inputs.rewards);
        let of_step = (self.step + 1, data.sequences.len());
        let scored = rewards.beside(of_step, &|| signals::requested().is_some(), |queue| {
            let start = Instant::now();
            self.sample(params, data, queue, seen)?;
            took("sample", start);
            seen.phase("score", 0, 1);
            let start = Instant::now();
            self.fill(data)?;
            took("score", start);
            Ok(Instant::now())
        });
        let scored = scored.map(|(waits, parts)| {
            if !parts.is_empty() {
                took("reward", waits);
            }
            data.parts = rewards.sum(parts, &mut data.columns.scores);
        });
        self.inputs.rewards = rewards;
        // A signal that ended a reward is what ends the step.
        scored.map_err(|e| stop(self.step).err().unwrap_or(e))
    }

    /// Continues the prompts with samples of the policy, each of which goes to the rewards when it
    /// ends.
    fn sample(
        &mut self,
        params: SamplingParams,
        data: &mut StepData,
        queue: &RewardQueue,
        seen: &mut dyn Observer,
    ) -> Result<()> {
        let Self { dev, inputs, models, arena, step, .. } = self;
        let (Some(policy), Some(sampling)) = (models.with_head(Head::Lm), inputs.needs.sampling())
        else {
            return Err(Error::value("an algorithm that samples", "a policy", "none"));
        };
        let _phase = dev.span("sample");
        let config = GenerationConfig {
            sampling: params,
            max_new_tokens: sampling.max_new_tokens,
            stop_ids: inputs.eos.iter().chain(&inputs.settings.stop_ids).copied().collect(),
            stream: Stream { seed: inputs.settings.seed, step: *step, purpose: Purpose::Sample },
        };
        let (prompts, mut made) = (data.prompts(), 0);
        let mut ends = vec![Vec::new(); if queue.is_read() { prompts.len() } else { 0 }];
        let total = prompts.len() * config.max_new_tokens;
        let (generator, scope) = (inputs.sizes.generator(), arena.scope());
        let done = generator.run(dev, policy, &scope, &prompts, &config, |new| {
            made += new.len();
            seen.phase("sample", made, total);
            for (at, token) in new.iter().copied().filter(|_| queue.is_read()) {
                ends[at].push(token);
                let stopped = config.stop_ids.contains(&token);
                if stopped || ends[at].len() == config.max_new_tokens {
                    let tokenizer = inputs.tokenizer.as_ref();
                    queue.put(at, data.reward_input(at, &ends[at], stopped, tokenizer)?)?;
                }
            }
            stop(*step)
        })?;
        data.continue_with(done);
        Ok(())
    }
}
