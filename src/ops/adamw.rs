//! AdamW (Loshchilov and Hutter 2019), as `torch.optim.AdamW` computes it.
//!
//! `p *= 1 - lr wd`, `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g²`,
//! `p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`

use half::bf16;

use crate::{
    device::{
        Device, Element, Float, View, ViewMut, Work,
        cuda::{Launch, kernels::adamw as kernel},
    },
    error::{Error, Result},
    shape, simd,
};

/// Elements at a multiple of which a group begins.
pub const LINE: usize = kernel::LINE;

/// Settings of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// What an update changes, all of one length.
#[derive(Debug)]
pub struct State<'a, F> {
    pub p: ViewMut<'a, F>,
    pub m: ViewMut<'a, F>,
    pub v: ViewMut<'a, F>,
    /// The new weights, rounded: what the model computes with.
    pub copy: Option<ViewMut<'a, bf16>>,
    /// Number of this update, from 1.
    pub t: u64,
}

/// Update number `state.t` with gradient `g * scale` (`scale` clips).
///
/// * `starts` `[groups]`: where each group of weights begins, in units of [`LINE`] elements,
///   ascending from 0; groups 0, 2, 4, ... decay, the others do not
///
/// Reads 4, writes 3 numbers a weight, and the copy.
pub fn step<F: Float>(
    dev: &Device,
    state: State<'_, F>,
    g: View<'_, F>,
    starts: View<'_, u32>,
    scale: f64,
    hyper: &Hyper,
) -> Result<()> {
    const OP: &str = "adamw";
    let n = g.len();
    shape::check(OP, "p", &[n], state.p.len())?;
    shape::check(OP, "m", &[n], state.m.len())?;
    shape::check(OP, "v", &[n], state.v.len())?;
    if let Some(copy) = &state.copy {
        shape::check(OP, "copy", &[n], copy.len())?;
    }
    if state.t == 0 {
        return Err(Error::value("adamw: update number", "1 or more", state.t));
    }
    if starts.is_empty() {
        return Err(Error::value("adamw: groups", "1 or more", 0));
    }
    let (lr, t) = (hyper.learning_rate, state.t as f64);
    // All corrections are folded into constants in f64, then rounded once.
    let k = Constants {
        keep: F::of(1.0 - lr * hyper.weight_decay),
        beta1: F::of(hyper.beta1),
        fresh1: F::of(1.0 - hyper.beta1),
        beta2: F::of(hyper.beta2),
        fresh2: F::of(1.0 - hyper.beta2),
        step: F::of(lr / (1.0 - libm::pow(hyper.beta1, t))),
        root: F::of(1.0 / (1.0 - libm::pow(hyper.beta2, t)).sqrt()),
        epsilon: F::of(hyper.epsilon),
        scale: F::of(scale),
    };
    let _op = dev.op(OP, || {
        Work::moves::<F>(7 * n).and(Work::moves::<bf16>(state.copy.as_ref().map_or(0, |c| c.len())))
    });
    let State { p, m, v, copy, .. } = state;
    match dev {
        Device::Cpu(cpu) => {
            let (p, m, v) = (p.host(), m.host(), v.host());
            let (g, starts) = (g.host(), starts.host());
            let at = |i: usize| starts.get(i).map_or(n, |s| (*s as usize * LINE).min(n));
            for i in 0..starts.len() {
                let range = at(i)..at(i + 1);
                let k = if i % 2 == 0 { k } else { Constants { keep: F::ONE, ..k } };
                let (p, m) = (&mut p[range.clone()], &mut m[range.clone()]);
                let (v, g) = (&mut v[range.clone()], &g[range.clone()]);
                let out = ((p, 1), (m, 1), (v, 1));
                cpu.rows(range.len(), 4096, out, |range, (p, m, v)| {
                    update(cpu.isa(), p, m, v, &g[range], k);
                });
            }
            if let Some(copy) = copy {
                let new = copy.host().iter_mut().zip(p.iter());
                new.for_each(|(to, p)| *to = bf16::of(p.f64()));
            }
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::row(n.div_ceil(kernel::THREADS * kernel::PACKETS * 4), 0)?;
            let groups = starts.len();
            let Constants { keep, beta1, fresh1, beta2, fresh2, step, root, epsilon, scale } = k;
            kernel::Step {
                p,
                m,
                v,
                g,
                copy,
                n: n as u64,
                starts,
                groups,
                keep,
                beta1,
                fresh1,
                beta2,
                fresh2,
                step,
                root,
                epsilon,
                scale,
            }
            .launch(cuda, launch)
        }
    }
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
