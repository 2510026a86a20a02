//! AdamW (Loshchilov and Hutter 2019), as `torch.optim.AdamW` computes it.
//!
//! `p *= 1 - lr wd`, `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g²`,
//! `p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`

use crate::{
    device::{Device, Float, View, ViewMut},
    error::{Error, Result},
    shape, simd,
};

/// Settings of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// What an update changes, all of one length.
#[derive(Debug)]
pub struct State<'a, F> {
    /// Weights.
    pub p: ViewMut<'a, F>,
    /// First moment.
    pub m: ViewMut<'a, F>,
    /// Second moment.
    pub v: ViewMut<'a, F>,
}

/// Update number `t`, counted from 1, with gradient `g * scale` (`scale` clips).
///
/// # Errors
/// [`Error::Shape`] if the buffers differ in length, [`Error::Value`] if `t` is 0.
pub fn step<F: Float>(
    dev: &Device,
    state: State<'_, F>,
    g: View<'_, F>,
    scale: f64,
    t: u64,
    hyper: &Hyper,
) -> Result<()> {
    let cpu = dev.on_cpu("adamw")?;
    let n = g.len();
    shape::check("adamw", "p", &[n], state.p.len())?;
    shape::check("adamw", "m", &[n], state.m.len())?;
    shape::check("adamw", "v", &[n], state.v.len())?;
    if t == 0 {
        return Err(Error::value("adamw: update number", "1 or more", t));
    }
    let (lr, t) = (hyper.learning_rate, t as f64);
    // All corrections are folded into constants in f64, then rounded once.
    let k = Constants {
        keep: F::of(1.0 - lr * hyper.weight_decay),
        beta1: F::of(hyper.beta1),
        fresh1: F::of(1.0 - hyper.beta1),
        beta2: F::of(hyper.beta2),
        fresh2: F::of(1.0 - hyper.beta2),
        step: F::of(lr / (1.0 - hyper.beta1.powf(t))),
        root: F::of(1.0 / (1.0 - hyper.beta2.powf(t)).sqrt()),
        epsilon: F::of(hyper.epsilon),
        scale: F::of(scale),
    };
    let g = g.host();
    let out = ((state.p.host(), 1), (state.m.host(), 1), (state.v.host(), 1));
    cpu.rows(n, 4096, out, |range, (p, m, v)| update(cpu.isa(), p, m, v, &g[range], k));
    Ok(())
}

#[derive(Clone, Copy)]
struct Constants<F> {
    keep: F,
    beta1: F,
    fresh1: F,
    beta2: F,
    fresh2: F,
    step: F,
    root: F,
    epsilon: F,
    scale: F,
}

simd! {
    fn update[F: Float](p: &mut [F], m: &mut [F], v: &mut [F], g: &[F], k: Constants<F>) {
        for i in 0..g.len() {
            let g = g[i] * k.scale;
            m[i] = m[i].mul_add(k.beta1, k.fresh1 * g);
            v[i] = v[i].mul_add(k.beta2, k.fresh2 * g * g);
            let denominator = v[i].sqrt().mul_add(k.root, k.epsilon);
            p[i] = p[i] * k.keep - k.step * m[i] / denominator;
        }
    }
}
