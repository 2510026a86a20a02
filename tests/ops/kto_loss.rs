//! KTO's loss of single completions: hand-worked values, central differences, micro-batches,
//! kernels. `algorithms::kto` has the values of TRL.

use warpo::{
    device::{Buffer, Device, Float},
    ops::{
        kto_loss::{self, KtoLoss, KtoSums},
        sequence_loss::{Offsets, SequenceColumns},
    },
};

use crate::support::{
    OP, assert_bits, assert_close, assert_nan_only, gradcheck, host, randn, refusal,
    sim::{self, Column, FloatCase, Lab},
};

const PLAIN: KtoLoss = KtoLoss { beta: 0.1, kl: 0.4, desirable: 1.33, undesirable: 0.9 };

#[derive(Clone)]
struct Completions<F> {
    logp: Vec<F>,
    reference: Vec<F>,
    labels: Vec<F>,
    offsets: Vec<u32>,
}

impl<F: Float> Completions<F> {
    /// Completions of these lengths, every third of them bad.
    fn random(lens: &[usize]) -> Self {
        let n = lens.iter().sum();
        let logp = |name: &str| -> Vec<F> {
            randn::<f64>(name, n).iter().map(|x| F::of(f64::from(-x.abs() as f32))).collect()
        };
        let mut offsets = vec![0];
        lens.iter().for_each(|n| offsets.push(offsets[offsets.len() - 1] + *n as u32));
        let labels = (0..lens.len()).map(|i| F::of(f64::from(u8::from(i % 3 != 1)))).collect();
        Self { logp: logp("logp"), reference: logp("reference"), labels, offsets }
    }

    fn loss(&self, s: KtoLoss) -> (KtoSums, Vec<F>) {
        self.loss_on(host(), 0, s, self.labels.len() as f64).unwrap()
    }

    /// The same of columns that begin `first` elements into their memory.
    fn loss_on(
        &self,
        dev: &Device,
        first: usize,
        s: KtoLoss,
        n: f64,
    ) -> warpo::Result<(KtoSums, Vec<F>)> {
        let columns = [&self.logp, &self.reference, &self.labels];
        let [logp, reference, labels] = columns.map(|x| Column::of(dev, first, x));
        let offsets = Buffer::of(dev, "offsets", &self.offsets)?;
        let mut d = Column::room(dev, first, self.logp.len());
        let columns = SequenceColumns {
            logp: logp.view(),
            ref_logp: Some(reference.view()),
            weights: None,
            offsets: Offsets { host: &self.offsets, view: offsets.view() },
        };
        let sums = kto_loss::forward(dev, d.view_mut(), columns, labels.view(), &s, n)?.get()?;
        Ok((sums, d.read()))
    }
}

fn list(s: &KtoSums) -> [f64; 7] {
    let rewards = [s.desirable_reward, s.undesirable_reward];
    [
        s.completions,
        s.loss,
        s.desirable,
        rewards[0],
        rewards[1],
        s.desirable_logp,
        s.undesirable_logp,
    ]
}

/// Two completions with a log-ratio of ln 3 above the KL, one good, one bad.
#[test]
fn hand_worked() {
    let ln3 = 3f64.ln();
    let c = Completions {
        logp: vec![-1.0, -2.0, -1.0],
        reference: vec![-1.0, -2.5 - ln3, -1.5 - ln3],
        labels: vec![1.0, 0.0],
        offsets: vec![0, 2, 3],
    };
    let s = KtoLoss { beta: 1.0, kl: 0.5, desirable: 2.0, undesirable: 3.0 };
    let (sums, d) = c.loss(s);
    // S(ln 3) = 3/4: a good one loses 1/4, a bad one 3/4; slopes are 3/16
    let want = [2.0, (2.0 * 0.25 + 3.0 * 0.75) / 2.0, 1.0, ln3 + 0.5, ln3 + 0.5, -3.0, -1.0];
    assert_close("sums", &list(&sums), &want, 1e-15, 1e-15);
    let (good, bad) = (-2.0 * 3.0 / 32.0, 3.0 * 3.0 / 32.0);
    assert_close("d", &d, &[good, good, bad], 1e-15, 1e-15);
    let none = Completions::<f64>::random(&[]).loss(s);
    assert_eq!(none, (KtoSums::default(), vec![]));
    // far on both sides
    let far = Completions { logp: vec![-1e5, -1.0, -1e5], ..c };
    let (sums, d) = far.loss(s);
    assert_eq!((sums.loss, &d[..]), (1.0, &[0.0, 0.0, 0.0][..]));
}

#[test]
fn gradients() {
    let c = Completions::<f64>::random(&[3, 1, 4, 2, 5]);
    for s in [PLAIN, KtoLoss { kl: 0.0, beta: 0.7, ..PLAIN }] {
        let d = c.loss(s).1;
        let f = |logp: &[f64]| Completions { logp: logp.to_vec(), ..c.clone() }.loss(s).0.loss;
        gradcheck(&format!("{s:?}"), &c.logp, &d, OP, f);
    }
}

#[test]
fn micro_batches_add_up() {
    let c = Completions::<f32>::random(&[3, 1, 4, 2, 5]);
    let (whole, d) = c.loss(PLAIN);
    for cut in 0..=5 {
        let part = |at: std::ops::Range<usize>| {
            let offsets = &c.offsets[at.start..=at.end];
            let span = offsets[0] as usize..offsets[offsets.len() - 1] as usize;
            let part = Completions {
                logp: c.logp[span.clone()].to_vec(),
                reference: c.reference[span].to_vec(),
                labels: c.labels[at].to_vec(),
                offsets: offsets.iter().map(|o| o - offsets[0]).collect(),
            };
            part.loss_on(host(), 0, PLAIN, 5.0).unwrap()
        };
        let ((mut sums, low), (rest, high)) = (part(0..cut), part(cut..5));
        sums.merge(&rest);
        assert_bits(&format!("{cut}"), &[low, high].concat(), &d);
        assert_close(&format!("{cut}"), &list(&sums), &list(&whole), 1e-13, 1e-13);
    }
}

#[test]
fn a_nan_stays_in_its_completion() {
    let clean = Completions::<f32>::random(&[3, 1, 4, 2]);
    let want = clean.loss(PLAIN).1;
    for reference in [false, true] {
        let mut c = clean.clone();
        (if reference { &mut c.reference } else { &mut c.logp })[5] = f32::NAN;
        let (sums, d) = c.loss(PLAIN);
        assert!(sums.loss.is_nan());
        assert_nan_only("d", &d, &want, 4..8);
    }
}

struct Compared(usize, Vec<usize>);

impl FloatCase for Compared {
    fn run<F: Float>(&self, lab: &mut Lab<'_>) -> warpo::Result<()> {
        let c = Completions::<F>::random(&self.1);
        let (sums, d) = c.loss_on(lab.dev(), self.0, PLAIN, 7.0)?;
        lab.sums("sums", &list(&sums));
        lab.column("dlogp", &d);
        Ok(())
    }
}

/// No completions, one, more than there are blocks; lengths around a block's threads; columns that
/// begin anywhere.
#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        let many = (0..515).map(|i| 1 + i % 3).collect();
        for (first, lens) in
            [(0, vec![]), (1, vec![1]), (3, vec![255, 256, 257, 1]), (2, vec![1, 770]), (0, many)]
        {
            sim.hold_f32(&Compared(first, lens));
        }
    });
}

#[test]
fn wrong_shapes_are_refused() {
    let good = Completions::<f32>::random(&[2, 1, 1]);
    let says = |c: &Completions<f32>| refusal(c.loss_on(host(), 0, PLAIN, 3.0));
    assert_eq!(
        says(&Completions { labels: vec![1.0; 2], ..good.clone() }),
        "kto_loss: `labels` has shape [2], wanted [3]"
    );
    assert_eq!(
        says(&Completions { reference: vec![0.0; 5], ..good }),
        "kto_loss: `ref_logp` has shape [5], wanted [4]"
    );
}
