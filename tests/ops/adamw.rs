//! AdamW: hand-worked updates, the trajectories of PyTorch, bits.

use warpo::{
    device::{Device, Float},
    ops::{
        adamw::{self, Hyper, State},
        grad_norm,
    },
};

use crate::support::{
    assert_bits, assert_close, assert_earned, assert_nan_only, devices, golden::Golden, narrow,
    randn, refusal, wide,
};

const HYPER: Hyper =
    Hyper { learning_rate: 0.1, beta1: 0.75, beta2: 0.9375, epsilon: 0.5, weight_decay: 0.25 };

/// Weights and both moments.
#[derive(Clone)]
struct Weights<F> {
    p: Vec<F>,
    m: Vec<F>,
    v: Vec<F>,
}

impl<F: Float> Weights<F> {
    fn fresh(p: &[F]) -> Self {
        Self { p: p.to_vec(), m: vec![F::ZERO; p.len()], v: vec![F::ZERO; p.len()] }
    }

    fn part(&self, at: usize) -> Self {
        Self { p: self.p[at..].to_vec(), m: self.m[at..].to_vec(), v: self.v[at..].to_vec() }
    }

    fn step(&mut self, dev: &Device, g: &[F], scale: f64, t: u64, hyper: &Hyper) {
        let state =
            State { p: (&mut self.p).into(), m: (&mut self.m).into(), v: (&mut self.v).into() };
        adamw::step(dev, state, g.into(), scale, t, hyper).unwrap();
    }
}

#[test]
fn hand_worked() {
    let dev = Device::cpu();
    let mut w = Weights::fresh(&[1.0, -2.0]);
    w.step(&dev, &[4.0, 0.0], 0.5, 1, &HYPER);
    // g = 2: m = 0.25 * 2, v = 0.0625 * 4; corrected 2 and 4; p = 0.975 - 0.1 * 2 / (2 + 0.5).
    // g = 0: only the decay.
    assert_close("m", &w.m, &[0.5, 0.0], 0.0, 1e-15);
    assert_close("v", &w.v, &[0.25, 0.0], 0.0, 1e-15);
    assert_close("p", &w.p, &[0.895, -1.95], 0.0, 1e-15);
    w.step(&dev, &[-1.0, 3.0], 1.0, 2, &HYPER);
    // m = 0.375 - 0.25, corrected by 1 - 0.75^2 = 0.4375; v = 0.234375 + 0.0625 = 0.296875, by
    // 1 - 0.9375^2 = 0.12109375
    assert_close("m", &w.m, &[0.125, 0.75], 0.0, 1e-15);
    assert_close("v", &w.v, &[0.296_875, 0.5625], 0.0, 1e-15);
    let moved = |m: f64, v: f64| 0.1 * (m / 0.4375) / ((v / 0.121_093_75).sqrt() + 0.5);
    let p = [0.895 * 0.975 - moved(0.125, 0.296_875), -1.95 * 0.975 - moved(0.75, 0.5625)];
    assert_close("p", &w.p, &p, 0.0, 1e-15);
}

#[test]
fn the_first_update_moves_each_weight_by_the_learning_rate() {
    let hyper = Hyper { epsilon: 0.0, weight_decay: 0.0, ..HYPER };
    let mut w = Weights::fresh(&[1.0, 1.0, 1.0]);
    w.step(&Device::cpu(), &[1e-9, -3.0, 1e9], 1.0, 1, &hyper);
    assert_close("p", &w.p, &[0.9, 1.1, 0.9], 0.0, 1e-15);
}

/// The same ten lines in f32 without fused or folded operations.
fn plain(w: &mut Weights<f32>, g: &[f32], scale: f32, t: i32, h: &Hyper) {
    let (b1, b2) = (h.beta1 as f32, h.beta2 as f32);
    for i in 0..g.len() {
        let g = g[i] * scale;
        w.p[i] *= 1.0 - h.learning_rate as f32 * h.weight_decay as f32;
        w.m[i] = b1 * w.m[i] + (1.0 - b1) * g;
        w.v[i] = b2 * w.v[i] + (1.0 - b2) * g * g;
        let (m, v) = (w.m[i] / (1.0 - b1.powi(t)), w.v[i] / (1.0 - b2.powi(t)));
        w.p[i] -= h.learning_rate as f32 * m / (v.sqrt() + h.epsilon as f32);
    }
}

#[test]
fn ten_updates_are_those_of_pytorch() {
    let g = Golden::open("pure/adamw.safetensors");
    let dev = Device::cpu();
    // Three tensors, clipped by their common norm: one flat buffer.
    let flat = |prefix: &str| [0, 1, 2].map(|i| g.get(&format!("{prefix}{i}")).to_vec()).concat();
    let at = |prefix: &str, t: usize| {
        let step = |i: usize| {
            let all = g.get(&format!("{prefix}{i}"));
            all[t * all.len() / 10..(t + 1) * all.len() / 10].to_vec()
        };
        [0, 1, 2].map(step).concat()
    };
    for (tag, beta2, weight_decay, clip) in [
        ("b95_wd0.01_clip1", 0.95, 0.01, 1.0),
        ("b999_wd0", 0.999, 0.0, 0.0),
        ("b999_wd0.1", 0.999, 0.1, 0.0),
    ] {
        let hyper = Hyper { learning_rate: 1e-2, beta1: 0.9, beta2, epsilon: 1e-8, weight_decay };
        let mut w = Weights::fresh(&flat("p"));
        let mut w32 = Weights::fresh(&narrow(&flat("p")));
        let mut naive = w32.clone();
        for t in 0..10 {
            let grad = at("g", t);
            let norm = grad_norm::norm(&dev, (&grad).into()).unwrap();
            let want = g.get(&format!("{tag}/norms"))[t];
            assert_close(&format!("{tag} norm {t}"), &[norm], &[want], 0.0, 1e-14);
            let scale = grad_norm::clip_scale(norm, clip);
            w.step(&dev, &grad, scale, t as u64 + 1, &hyper);
            let p = at(&format!("{tag}/p"), t);
            // Ten roundings of numbers near 1.
            assert_close(&format!("{tag} p {t}"), &w.p, &p, 1e-14, 1e-14);
            let grad = narrow(&grad);
            w32.step(&dev, &grad, scale, t as u64 + 1, &hyper);
            plain(&mut naive, &grad, scale as f32, t as i32 + 1, &hyper);
            assert_earned(&format!("{tag} p {t}"), &w32.p, &naive.p, &p);
        }
        let (m, v) = (flat(&format!("{tag}/m")), flat(&format!("{tag}/v")));
        assert_close(&format!("{tag} m"), &w.m, &m, 1e-15, 1e-14);
        assert_close(&format!("{tag} v"), &w.v, &v, 1e-15, 1e-14);
        assert_earned(&format!("{tag} m"), &w32.m, &naive.m, &m);
        assert_earned(&format!("{tag} v"), &w32.v, &naive.v, &v);
    }
    g.all_read(&[]);
}

/// The second moment's correction is small: 1000 updates stay with f64.
#[test]
fn small_steps_are_not_lost() {
    let hyper = Hyper { learning_rate: 1e-6, beta2: 0.999, epsilon: 1e-8, ..HYPER };
    let p: Vec<f32> = randn("p", 33);
    let (mut w, mut truth) = (Weights::fresh(&p), Weights::fresh(&wide(&p)));
    let mut naive = w.clone();
    for t in 1..=1000 {
        let g: Vec<f32> = randn(&format!("g{t}"), 33);
        w.step(&Device::cpu(), &g, 1.0, t, &hyper);
        truth.step(&Device::cpu(), &wide(&g), 1.0, t, &hyper);
        plain(&mut naive, &g, 1.0, t as i32, &hyper);
    }
    assert_earned("p", &w.p, &naive.p, &truth.p);
    let moved = w.p.iter().zip(&p).filter(|(a, b)| a != b).count();
    assert_eq!(moved, 33);
}

/// Tasks have 4096 elements.
#[test]
fn rows_do_not_see_their_batch() {
    let n = 4111;
    let g: Vec<f32> = randn("g", n);
    let mut start = Weights { p: randn("p", n), m: randn("m", n), v: randn::<f32>("v", n) };
    start.v.iter_mut().for_each(|v| *v = v.abs());
    let mut want = start.clone();
    want.step(&devices()[0], &g, 0.7, 3, &HYPER);
    for dev in devices() {
        for len in [0, 1, 4095, 4096, 4097, n] {
            let at = n - len;
            let mut w = start.part(at);
            w.step(&dev, &g[at..], 0.7, 3, &HYPER);
            assert_bits(&format!("p {len} {dev:?}"), &w.p, &want.p[at..]);
            assert_bits(&format!("m {len} {dev:?}"), &w.m, &want.m[at..]);
            assert_bits(&format!("v {len} {dev:?}"), &w.v, &want.v[at..]);
        }
    }
}

#[test]
fn a_nan_stays_where_it_is() {
    let mut g: Vec<f32> = randn("g", 40);
    let (mut w, mut clean) = (Weights::fresh(&g), Weights::fresh(&g));
    clean.step(&Device::cpu(), &g, 1.0, 1, &HYPER);
    g[17] = f32::NAN;
    w.step(&Device::cpu(), &g, 1.0, 1, &HYPER);
    assert_nan_only("p", &w.p, &clean.p, 17..18);
    assert_nan_only("m", &w.m, &clean.m, 17..18);
    assert_nan_only("v", &w.v, &clean.v, 17..18);
}

#[test]
fn wrong_shapes_and_update_0_are_refused() {
    let refused = |p: usize, m: usize, v: usize, t: u64| {
        let (mut p, mut m, mut v) = (vec![0.0f32; p], vec![0.0; m], vec![0.0; v]);
        let state = State { p: (&mut p).into(), m: (&mut m).into(), v: (&mut v).into() };
        let g = vec![0.0; 3];
        refusal(adamw::step(&Device::cpu(), state, (&g).into(), 1.0, t, &HYPER))
    };
    assert_eq!(refused(2, 3, 3, 1), "adamw: `p` has shape [2], wanted [3]");
    assert_eq!(refused(3, 4, 3, 1), "adamw: `m` has shape [4], wanted [3]");
    assert_eq!(refused(3, 3, 2, 1), "adamw: `v` has shape [2], wanted [3]");
    assert_eq!(refused(3, 3, 3, 0), "adamw: update number: got 0, wanted 1 or more");
}
