//! Samples of a policy on held-out prompts, rated by models.

use super::distinct;
use crate::{
    data::{Sequence, Tokenizer},
    device::{Arena, Device, Element},
    error::Result,
    models::{Batch, Model},
    rollout::{Completion, GenerationConfig, Generator, Prompt, Scorer, ScoringPass, last_scores},
};

/// A comparison of policies on the same prompts, with the same draws and the same scorers.
#[derive(Debug)]
pub struct Evaluator<'a, T: Element> {
    pub dev: &'a Device,
    pub tokenizer: Option<&'a Tokenizer>,
    /// Prompts that training has not seen.
    pub prompts: &'a [Sequence],
    /// Sampling of the continuations.
    pub settings: &'a GenerationConfig,
    /// The policy that training started from.
    pub reference: &'a Model<T>,
    /// Models with a scalar head, each of which rates every sample.
    pub scorers: &'a [&'a Model<T>],
}

#[derive(Clone, Debug)]
pub struct Sample {
    /// Text of the prompt.
    pub prompt: String,
    /// Text of the completion.
    pub text: String,
    /// One score for each scorer.
    pub scores: Vec<f32>,
    /// log(policy / reference) of the completion, in nats.
    pub kl: f64,
    pub tokens: usize,
    pub stopped: bool,
}

/// The samples of a policy, and their means.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// One for each prompt.
    pub samples: Vec<Sample>,
    /// Mean score of each scorer.
    pub scores: Vec<f64>,
    /// KL to the reference in nats a completion: the mean of log(policy / reference), an unbiased
    /// estimate.
    pub kl: f64,
    /// Entropy of the policy in nats a token, over the tokens it sampled.
    pub entropy: f64,
    /// New tokens a completion.
    pub tokens: f64,
    /// Share of completions that ended by themselves.
    pub stopped: f64,
    /// Distinct 1-grams and 2-grams of words over all; see [`distinct`].
    pub distinct: [f64; 2],
}

impl<T: Element<Acc = f32>> Evaluator<'_, T> {
    /// Samples one completion a prompt from `policy` and rates all of them.
    pub fn run(&self, policy: &Model<T>) -> Result<Evaluation> {
        let all: Vec<Prompt> = self
            .prompts
            .iter()
            .zip(0..)
            .map(|(p, sample)| Prompt { sample, ids: p.ids.clone() })
            .collect();
        let generator = Generator::for_prompts(&all, self.settings.max_new_tokens, 64, 512);
        let bytes = generator.plan::<T>(self.dev, policy.spec(), &self.settings.sampling)?;
        let mut arena = Arena::new(self.dev, bytes)?;
        let scope = arena.scope();
        let done = generator.run(self.dev, policy, &scope, &all, self.settings, |_| Ok(()))?;
        drop(scope);
        let sequence = |(p, c): (&Sequence, &Completion<f32>)| {
            let ids = [&p.ids[..], &c.ids].concat();
            let new = p.ids.len()..ids.len();
            Sequence { ids, predicted: vec![new], place: p.place.clone() }
        };
        let whole: Vec<Sequence> = self.prompts.iter().zip(&done).map(sequence).collect();
        let (ours, entropy) = self.logprobs(policy, &whole)?;
        let (theirs, _) = self.logprobs(self.reference, &whole)?;
        let scores =
            self.scorers.iter().map(|j| rate(self.dev, j, &whole)).collect::<Result<Vec<_>>>()?;
        let mut samples = Vec::with_capacity(all.len());
        let mut at = 0;
        for (i, (p, c)) in all.iter().zip(&done).enumerate() {
            let span = at..at + c.ids.len();
            at = span.end;
            let ratio = |t: usize| f64::from(ours[t]) - f64::from(theirs[t]);
            let prompt = self.tokenizer.map(|t| t.decode(&p.ids)).transpose()?;
            let text = self.tokenizer.map(|t| t.decode_continuation(&p.ids, &c.ids)).transpose()?;
            samples.push(Sample {
                prompt: prompt.unwrap_or_default(),
                text: text.unwrap_or_default(),
                scores: scores.iter().map(|s| s[i]).collect(),
                kl: span.map(ratio).sum(),
                tokens: c.ids.len(),
                stopped: c.stopped,
            });
        }
        Ok(summary(samples, &scores, &entropy, &done))
    }

    /// Log-probs and entropies of all completions, one after another.
    fn logprobs(&self, model: &Model<T>, whole: &[Sequence]) -> Result<(Vec<f32>, Vec<f32>)> {
        let (dev, scorer) = (self.dev, Scorer::for_lengths(whole.iter().map(|s| s.ids.len())));
        let mut arena = Arena::new(dev, scorer.plan::<T>(dev, model.spec(), model.head())?)?;
        let (mut logp, mut entropy, batch) = (Vec::new(), Vec::new(), &mut Batch::default());
        let temperature = self.settings.sampling.temperature;
        let model = (model, if temperature == 0.0 { 1.0 } else { temperature });
        let push = |batch: &mut Batch, s: &Sequence| batch.push_masked(&s.ids, &s.predicted);
        let mut pass = ScoringPass { dev, scorer, arena: &mut arena, batch };
        pass.run(model, whole, push, &mut logp, Some(&mut entropy))?;
        Ok((logp, entropy))
    }
}

/// The score of each text by a model with a scalar head.
pub fn rate<T: Element, S: AsRef<[u32]>>(
    dev: &Device,
    model: &Model<T>,
    whole: &[S],
) -> Result<Vec<T::Acc>> {
    let all: Vec<&[u32]> = whole.iter().map(AsRef::as_ref).collect();
    let scorer = Scorer::for_lengths(all.iter().map(|s| s.len()));
    let mut arena = Arena::new(dev, scorer.plan::<T>(dev, model.spec(), model.head())?)?;
    last_scores(dev, model, &mut arena, scorer, &all)
}

fn summary(
    samples: Vec<Sample>,
    scores: &[Vec<f32>],
    entropy: &[f32],
    done: &[Completion<f32>],
) -> Evaluation {
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>() / x.len().max(1) as f64;
    let n = samples.len().max(1) as f64;
    let mean = |f: &dyn Fn(&Sample) -> f64| samples.iter().map(f).sum::<f64>() / n;
    let grams = |k| distinct(samples.iter().map(|s| s.text.as_str()), k);
    Evaluation {
        scores: scores.iter().map(|s| wide(s)).collect(),
        kl: mean(&|s| s.kl),
        entropy: wide(entropy),
        tokens: mean(&|s| s.tokens as f64),
        stopped: done.iter().filter(|c| c.stopped).count() as f64 / n,
        distinct: [grams(1), grams(2)],
        samples,
    }
}
