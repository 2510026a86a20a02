//! The kernels of the LM head: against the CPU, and bits that neither batch nor tile can change.

use warpo::{
    Result,
    device::{Buffer, Device, Element, Float, cuda::Order},
    ops::{
        logprob::{self, LmHead, LogitSettings, Outputs, Slopes},
        matmul::Packed,
    },
};

use super::{Head, backward, forward, targets};
use crate::support::{
    assert_bits, assert_nan_only, assert_norm, host, randn,
    sim::{self, Case, Lab},
};

/// The LM head at one shape.
#[derive(Clone, Copy)]
struct Gathered {
    rows: usize,
    vocab: usize,
    d: usize,
    softcap: Option<f64>,
}

impl Gathered {
    fn settings<F: Float>(&self) -> LogitSettings<F> {
        LogitSettings { temperature: F::of(0.75), softcap: self.softcap.map(F::of) }
    }
}

impl Case for Gathered {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let Self { rows, vocab, d, .. } = *self;
        let dev = lab.dev();
        let (h, w) = (lab.rows::<T>("h", rows, d), lab.input::<T>("w", vocab * d));
        let targets = lab.ids("targets", rows, vocab);
        let mut packed = Packed::new(dev, vocab, d)?;
        packed.pack(dev, w.view())?;
        let mut scratch = lab.room::<T::Acc>(logprob::scratch_len(rows, vocab));
        for name in [None, Some("entropy")] {
            let [mut logp, mut lse, mut entropy] = [(); 3].map(|()| lab.room::<T::Acc>(rows));
            let wanted = name.map(|_| entropy.view_mut());
            let out = Outputs { logp: logp.view_mut(), lse: lse.view_mut(), entropy: wanted };
            let head = LmHead { w: (&packed).into(), settings: self.settings() };
            let (h, targets) = (h.view(), targets.view());
            logprob::forward(dev, out, h, head, targets, scratch.view_mut())?;
            lab.by_row("logp", &logp);
            lab.by_row("lse", &lse);
            let Some(name) = name else { continue };
            lab.by_row(name, &entropy);
            let (dlogp, dentropy) = (lab.rows("dlogp", rows, 1), lab.rows("dentropy", rows, 1));
            let mut scratch = lab.room(logprob::backward_scratch_len(rows, vocab, d));
            for with in [false, true] {
                let f = logprob::Forward {
                    h,
                    head,
                    w: w.view(),
                    targets,
                    lse: lse.view(),
                    entropy: with.then(|| entropy.view()),
                };
                let mut dh = lab.room::<T>(rows * d);
                let mut dw = lab.input::<T::Acc>("dw", vocab * d);
                let (to, add, room) = (dh.view_mut(), Some(dw.view_mut()), scratch.view_mut());
                let dentropy = with.then(|| dentropy.view());
                let slopes = Slopes { dlogp: dlogp.view(), dentropy };
                logprob::backward(dev, to, add, slopes, f, room)?;
                lab.by_row("dh", &dh);
                lab.sum_of::<T>("dw", &dw);
            }
        }
        Ok(())
    }
}

/// Each tile, vocabularies around tiles of 128 and chunks of 1024.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        let case = |rows, vocab, d| Gathered { rows, vocab, d, softcap: None };
        for case in [case(1, 1, 8), case(15, 7, 24), case(16, 127, 40), case(17, 129, 72)] {
            sim.hold_bf16(&case);
            sim.hold_bf16(&Gathered { softcap: Some(1.5), ..case });
        }
        sim.hold_bf16(&case(0, 5, 8));
        sim.hold_bf16(&case(1, 1024, 8));
        sim.hold_bf16(&case(3, 1025, 72));
        sim.hold_bf16(&case(65, 135, 40));
        sim.hold_bf16(&Gathered { softcap: Some(2.0), ..case(129, 129, 8) });
    });
}

/// 131 rows take tiles of 128, the last 65 of them too, the last 64 their own, as the last 16.
#[test]
fn kernel_rows_do_not_see_their_batch() {
    sim::check(|sim| {
        let case = |rows| Gathered { rows, vocab: 140, d: 40, softcap: None };
        sim.hold_rows_bf16(131, case);
        sim.hold_rows_bf16(66, |rows| Gathered { softcap: Some(3.0), ..case(rows) });
        sim.hold_rows_bf16(18, |rows| Gathered { vocab: 1100, ..case(rows) });
    });
}

/// [`logprob::from_logits`] at one shape.
struct Given {
    rows: usize,
    vocab: usize,
    softcap: Option<f64>,
}

impl Case for Given {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let (rows, vocab) = (self.rows, self.vocab);
        let (z, targets) = (lab.rows::<T>("z", rows, vocab), lab.ids("targets", rows, vocab));
        let [mut logp, mut lse, mut entropy] = [(); 3].map(|()| lab.room::<T::Acc>(rows));
        let softcap = self.softcap.map(Element::of);
        let settings = LogitSettings { temperature: Element::of(0.75), softcap };
        let entropy_ = Some(entropy.view_mut());
        let out = Outputs { logp: logp.view_mut(), lse: lse.view_mut(), entropy: entropy_ };
        logprob::from_logits(lab.dev(), out, z.view(), targets.view(), settings)?;
        lab.by_row("logp", &logp);
        lab.by_row("lse", &lse);
        lab.by_row("entropy", &entropy);
        Ok(())
    }
}

#[test]
fn kernels_from_logits_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (rows, vocab) in [(1, 1), (3, 7), (2, 129), (2, 1025), (1, 66_000)] {
            for softcap in [None, Some(1.5)] {
                sim.hold(&Given { rows, vocab, softcap });
            }
        }
        sim.hold_rows(9, |rows| Given { rows, vocab: 1300, softcap: None });
    });
}

/// Log-probs, entropy and dh of a head `[vocab, 8]` on the simulator.
fn on_kernels(dev: &Device, h: &[f64], w: &[f64], targets: &[u32]) -> [Vec<f32>; 3] {
    type B = half::bf16;
    let (rows, vocab, d) = (targets.len(), w.len() / 8, 8);
    let of = |x: &[f64]| {
        let x: Vec<B> = x.iter().map(|x| Element::of(*x)).collect();
        Buffer::of(dev, "test", &x).unwrap()
    };
    let (h, w) = (of(h), of(w));
    let targets = Buffer::of(dev, "test", targets).unwrap();
    let mut packed = Packed::new(dev, vocab, d).unwrap();
    packed.pack(dev, w.view()).unwrap();
    let room = |n| Buffer::<f32>::new(dev, "test", n).unwrap();
    let [mut logp, mut lse, mut entropy] = [(); 3].map(|()| room(rows));
    let mut scratch =
        room(logprob::scratch_len(rows, vocab).max(logprob::backward_scratch_len(rows, vocab, d)));
    let head = LmHead { w: (&packed).into(), settings: LogitSettings::default() };
    let entropy_ = Some(entropy.view_mut());
    let out = Outputs { logp: logp.view_mut(), lse: lse.view_mut(), entropy: entropy_ };
    let (x, t) = (h.view(), targets.view());
    logprob::forward(dev, out, x, head, t, scratch.view_mut()).unwrap();
    let ones = Buffer::of(dev, "test", &vec![1.0f32; rows]).unwrap();
    let f = logprob::Forward {
        h: x,
        head,
        w: w.view(),
        targets: t,
        lse: lse.view(),
        entropy: Some(entropy.view()),
    };
    let mut dh = Buffer::<B>::new(dev, "test", rows * d).unwrap();
    let slopes = Slopes { dlogp: ones.view(), dentropy: Some(ones.view()) };
    logprob::backward(dev, dh.view_mut(), None, slopes, f, scratch.view_mut()).unwrap();
    let dh = dev.read(dh.view()).unwrap().iter().map(|x| x.to_f32()).collect();
    [dev.read(logp.view()).unwrap(), dev.read(entropy.view()).unwrap(), dh]
}

/// In every tile; and a target beyond the vocabulary is found in its row alone.
#[test]
fn kernels_keep_a_nan_in_its_row() {
    sim::check(|sim| {
        let dev = sim.device(Order::default());
        keep_a_nan(&dev, &[(5, 131), (20, 1030), (70, 9)]);
    });
}

fn keep_a_nan(dev: &Device, shapes: &[(usize, usize)]) {
    for (rows, vocab) in shapes.iter().copied() {
        let (mut h, w): (Vec<f64>, Vec<f64>) = (randn("h", rows * 8), randn("w", vocab * 8));
        let mut targets = targets(rows, vocab);
        let clean = on_kernels(dev, &h, &w, &targets);
        h[2 * 8 + 5] = f64::NAN;
        let got = on_kernels(dev, &h, &w, &targets);
        assert_nan_only("logp", &got[0], &clean[0], 2..3);
        assert_nan_only("entropy", &got[1], &clean[1], 2..3);
        assert_nan_only("dh", &got[2], &clean[2], 16..24);
        h[2 * 8 + 5] = 0.0;
        let clean = on_kernels(dev, &h, &w, &targets);
        for beyond in [vocab as u32, u32::MAX] {
            targets[3] = beyond;
            let got = on_kernels(dev, &h, &w, &targets);
            assert_nan_only("logp", &got[0], &clean[0], 3..4);
            assert_bits("entropy", &got[1], &clean[1]);
        }
    }
}

/// More columns than a slice of the vocabulary has, and more rows than are taken at a time.
#[test]
fn kernels_go_on_with_the_next_slice_and_wave() {
    sim::check(|sim| {
        let dev = sim.device(Order::default());
        go_on(&dev);
        let rows = 16_384 + 3;
        let (h, w): (Vec<f64>, Vec<f64>) = (randn("h", rows * 8), randn("w", 40));
        let targets = super::targets(rows, 5);
        let all = on_kernels(&dev, &h, &w, &targets);
        let last = on_kernels(&dev, &h[16_380 * 8..], &w, &targets[16_380..]);
        assert_bits("logp", &all[0][16_380..], &last[0]);
        assert_bits("entropy", &all[1][16_380..], &last[1]);
        assert_bits("dh", &all[2][16_380 * 8..], &last[2]);
    });
}

fn go_on(dev: &Device) {
    let at = |x: f64| <half::bf16 as Element>::of(x).f64();
    let (rows, vocab) = (2, 8195);
    let h: Vec<f64> = randn::<f64>("h", rows * 8).iter().map(|x| at(*x)).collect();
    let w: Vec<f64> = randn::<f64>("w", vocab * 8).iter().map(|x| at(*x)).collect();
    let targets = targets(rows, vocab);
    let ours = on_kernels(dev, &h, &w, &targets);
    let head = Head::new(host(), &w, vocab);
    let truth = forward(host(), &h, &head, &targets, 1.0);
    assert_norm("logp", &ours[0], &truth.logp, 1e-6);
    assert_norm("entropy", &ours[1], &truth.entropy, 1e-6);
    let (mut dw, ones) = (vec![0.0; w.len()], vec![1.0; rows]);
    let dh = backward(host(), &mut dw, (&ones, Some(&ones)), &h, &head, &targets, 1.0);
    assert_norm("dh", &ours[2], &dh, 0.01);
}

/// Each tile and more blocks than one, vocabularies around tiles of 128 and 256 and chunks of 1024,
/// more of d than the ring holds.
#[test]
fn kernels_on_hopper_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        let sim = sim.hopper();
        let all = [
            (1, 1, 8, None),
            (17, 129, 72, Some(1.5)),
            (129, 250, 136, Some(1.5)),
            (3, 2100, 264, None),
            (65, 300, 328, None),
            (257, 1025, 8, Some(2.0)),
        ];
        for (rows, vocab, d, softcap) in sim::cases(4, all) {
            sim.hold_bf16(&Gathered { rows, vocab, d, softcap });
        }
    });
}

/// 196 rows take the widest tiles, the last 98 the next. Whether a warp's rows have a target in a
/// tile, which another path computes, does not show in those that have none.
#[test]
fn kernel_rows_on_hopper_do_not_see_their_batch() {
    sim::check(|sim| {
        let sim = sim.hopper();
        let case = |rows| Gathered { rows, vocab: 300, d: 72, softcap: None };
        sim.hold_rows_bf16(196, case);
        sim.hold_rows_bf16(66, |rows| Gathered { softcap: Some(3.0), vocab: 1100, ..case(rows) });
        sim.hold_rows_bf16(7, |rows| Gathered { vocab: 2100, d: 8, ..case(rows) });
    });
}

#[test]
fn kernels_on_hopper_keep_a_nan_in_its_row() {
    sim::check(|sim| {
        let dev = sim.hopper().device(Order::default());
        keep_a_nan(&dev, &[(5, 131), (70, 1030), (130, 9)]);
    });
}

/// More columns than a slice of the vocabulary has.
#[test]
fn kernels_on_hopper_go_on_with_the_next_slice() {
    sim::check(|sim| go_on(&sim.hopper().device(Order::default())));
}
