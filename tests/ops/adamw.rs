//! AdamW: hand-worked updates, the trajectories of PyTorch, bits.

use warpo::{
    device::{Buffer, Device, Float},
    ops::{
        adamw::{self, Hyper, State},
        grad_norm,
    },
};

use half::bf16;

use crate::support::{
    assert_bits, assert_close, assert_earned, assert_nan_only, assert_refuses, devices,
    golden::Golden, host, narrow, randn, refusal, sim, wide, zeros,
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
        let (p, m, v) = ((&mut self.p).into(), (&mut self.m).into(), (&mut self.v).into());
        let state = State { p, m, v, copy: None, t };
        adamw::step(dev, state, g.into(), [0][..].into(), scale, hyper).unwrap();
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
            let norm = grad_norm::norm(&dev, (&grad).into()).unwrap().get().unwrap();
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

/// Groups 0 and 2 decay, group 1 does not; the last one reaches to the end.
#[test]
fn groups_decay_or_not() {
    let (line, hyper) = (adamw::LINE, Hyper { learning_rate: 0.5, ..HYPER });
    let (n, starts) = (5 * line + 3, [0, 2, 4]);
    let mut w = Weights::fresh(&vec![1.0; n]);
    let (p, m, v) = ((&mut w.p).into(), (&mut w.m).into(), (&mut w.v).into());
    let mut copy = vec![bf16::NAN; n];
    let state = State { p, m, v, copy: Some((&mut copy).into()), t: 1 };
    let g = vec![0.0; n];
    adamw::step(host(), state, (&g).into(), starts[..].into(), 1.0, &hyper).unwrap();
    for (i, p) in w.p.iter().enumerate() {
        let decays = !(2 * line..4 * line).contains(&i);
        assert_eq!(*p, if decays { 0.875 } else { 1.0 }, "{i}");
        assert_eq!(copy[i].to_f64(), *p);
    }
}

/// Elements that fill no packet, a block, one more; groups of one line, of many, of none, and one
/// that begins in the middle of a block or after it.
#[test]
fn the_kernel_has_the_bits_of_the_cpu() {
    sim::check(|sim| {
        for (n, starts) in [
            (1, &[0][..]),
            (3, &[0]),
            (68, &[0, 0, 2, 3]),
            (2047, &[0, 1, 2, 3, 100, 127]),
            (2048, &[0, 64]),
            (2049, &[0, 1, 128]),
            (3 * 2048 + 1031, &[0, 130, 131, 390, 400]),
        ] {
            let g: Vec<f32> = randn("g", n);
            let mut want = Weights { p: randn("p", n), m: randn("m", n), v: randn::<f32>("v", n) };
            want.v.iter_mut().for_each(|v| *v = v.abs());
            let start = want.clone();
            let run = |dev: &Device, w: &Weights<f32>, copied: bool| {
                let of = |x: &[f32]| Buffer::of(dev, "test", x).unwrap();
                let [mut p, mut m, mut v, g] = [of(&w.p), of(&w.m), of(&w.v), of(&g)];
                let starts = Buffer::of(dev, "starts", starts).unwrap();
                let mut copy = Buffer::<bf16>::new(dev, "copy", n).unwrap();
                let (p_, m_, v_) = (p.view_mut(), m.view_mut(), v.view_mut());
                let copy_ = copied.then(|| copy.view_mut());
                let state = State { p: p_, m: m_, v: v_, copy: copy_, t: 3 };
                adamw::step(dev, state, g.view(), starts.view(), 0.7, &HYPER).unwrap();
                let read = |x: &Buffer<'_, f32>| dev.read(x.view()).unwrap();
                let w = Weights { p: read(&p), m: read(&m), v: read(&v) };
                (w, copied.then(|| dev.read(copy.view()).unwrap()))
            };
            let (want, copy) = run(host(), &start, true);
            for order in sim.orders() {
                let (w, copied) = run(&sim.device(order), &start, order.threads % 2 == 0);
                assert_bits(&format!("p {n} {order:?}"), &w.p, &want.p);
                assert_bits(&format!("m {n} {order:?}"), &w.m, &want.m);
                assert_bits(&format!("v {n} {order:?}"), &w.v, &want.v);
                assert!(copied.is_none() || copied == copy, "{n} {order:?}");
            }
        }
    });
}

#[test]
fn wrong_shapes_and_update_0_are_refused() {
    let step = |n: [usize; 3], t: u64| {
        let [mut p, mut m, mut v] = zeros(n);
        let (p, m, v) = ((&mut p).into(), (&mut m).into(), (&mut v).into());
        let (state, g, starts) = (State { p, m, v, copy: None, t }, [0.0; 3], [0]);
        adamw::step(host(), state, g[..].into(), starts[..].into(), 1.0, &HYPER)
    };
    assert_refuses("adamw", "p [3] m [3] v [3]", |n| step(n, 1));
    assert_eq!(refusal(step([3; 3], 0)), "adamw: update number: got 0, wanted 1 or more");
}
