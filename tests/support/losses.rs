//! Losses of algorithms on columns, without a model.

use std::collections::BTreeMap;

use warpo::{
    algorithms::{Algorithm, Columns, Metrics, MicroBatch},
    config,
    device::Device,
};

use super::runs::entry;

/// An algorithm with some settings.
pub fn build(name: &str, pairs: &[&str]) -> warpo::Result<Box<dyn Algorithm>> {
    let mut section = (entry(name).section)();
    for pair in pairs {
        config::set_pair(&mut [&mut *section], pair)?;
    }
    (entry(name).build)(&*section)
}

/// Consecutive micro-batches of the columns, `per` sequences each.
fn micros(c: &Columns<f32>, per: usize) -> impl Iterator<Item = MicroBatch<'_, f32>> {
    let n = c.sequences();
    (0..n).step_by(per).map(move |s| MicroBatch::new(c, s..(s + per).min(n)))
}

/// d loss / d log-prob of a minibatch, `per` sequences a micro-batch.
pub fn policy_loss(
    a: &mut dyn Algorithm,
    c: &Columns<f32>,
    logp: &[f32],
    entropy: Option<&[f32]>,
    per: usize,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; logp.len()];
    for micro in micros(c, per) {
        let t = micro.tokens();
        let (logp, d) = (logp[t.clone()].into(), (&mut out[t.clone()]).into());
        let mut dentropy = vec![f32::NAN; t.len()];
        let h = entropy.map(|h| h[t].into());
        let dh = entropy.map(|_| dentropy.as_mut_slice().into());
        a.policy_loss(&Device::cpu(), &micro, logp, h, d, dh).unwrap();
    }
    out
}

/// d loss / d scalar of a minibatch, `per` sequences a micro-batch.
pub fn scalar_loss(a: &mut dyn Algorithm, c: &Columns<f32>, y: &[f32], per: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; y.len()];
    for micro in micros(c, per) {
        let t = micro.tokens();
        let (y, d) = (y[t.clone()].into(), (&mut out[t]).into());
        a.scalar_loss(&Device::cpu(), &micro, y, d).unwrap();
    }
    out
}

/// The metrics that an algorithm reports at the end of a step.
pub fn finish(a: &mut dyn Algorithm) -> BTreeMap<&'static str, f64> {
    let mut out = Metrics::new();
    a.finish(&mut out).unwrap();
    out.into_iter().collect()
}
