//! Matrix products beside the best of cuBLASLt's algorithms: in turn, on the same buffers, in one
//! run.

use std::ops::Range;

use half::bf16;
use serde_json::json;
use warpo::{
    Result,
    device::{Buffer, Device, Element},
    ops::{
        activation::Activation,
        matmul::{self, Epilogue, Packed, Weight},
    },
    rng::{Philox, Purpose},
};

use super::{
    Bench,
    cublaslt::{Algorithm, Lt, Of, Product},
};

/// Weights of a layer: name, outputs, inputs.
type Weights = [(&'static str, usize, usize); 4];

/// Of Qwen2.5.
const MODELS: [(&str, Weights); 3] = [
    ("0.5b", [("qkv", 1152, 896), ("out", 896, 896), ("gate_up", 9728, 896), ("down", 896, 4864)]),
    (
        "1.5b",
        [("qkv", 2048, 1536), ("out", 1536, 1536), ("gate_up", 17_920, 1536), ("down", 1536, 8960)],
    ),
    (
        "7b",
        [
            ("qkv", 4608, 3584),
            ("out", 3584, 3584),
            ("gate_up", 37_888, 3584),
            ("down", 3584, 18_944),
        ],
    ),
];
const TOKENS: [usize; 3] = [4096, 16_384, 32_768];
const DECODED: [usize; 5] = [1, 8, 16, 32, 64];
const DIRECTIONS: [(&str, Of); 3] = [
    ("forward", Of::Forward),
    ("backward_input", Of::BackwardInput),
    ("backward_weight", Of::BackwardWeight),
];

/// More bytes than any cache holds: calls of a round work on so much, each on its own part.
const ROUND: usize = 256 << 20;
/// What a round takes at least, unless it has [`CALLS`] calls: while the device copies before a
/// round, the host queues so many, and its own time is not measured.
const SECONDS: f64 = 0.02;
const CALLS: f64 = 100.0;
/// Bytes of such copies.
const AHEAD: usize = 2 << 30;
/// Of each, in turn: both see the same clocks and temperature.
const ROUNDS: usize = 9;

struct Job {
    name: String,
    product: Product,
    /// With the gated activation after it.
    activated: bool,
}

impl Job {
    fn all(tiny: bool) -> Vec<Self> {
        let mut all = Vec::new();
        let mut add = |direction: &str, of, layer: &str, [m, n, k]: [usize; 3]| {
            let name = format!("matmul/{direction}/{layer}/{m}");
            let activated = direction == "activated";
            all.push(Self { name, product: Product { of, m, n, k }, activated });
        };
        let mut layer = |layer: &str, sides: [usize; 3]| {
            for (direction, of) in DIRECTIONS {
                add(direction, of, layer, sides);
            }
            if layer.ends_with("gate_up") {
                add("activated", Of::Forward, layer, sides);
            }
        };
        if tiny {
            layer("gate_up", [9, 48, 64]);
            return all;
        }
        layer("square", [8192; 3]);
        layer("square", [4096; 3]);
        let shapes = || {
            let of = |(model, weights): (&'static str, Weights)| {
                weights.map(|(layer, n, k)| (format!("{model}/{layer}"), n, k))
            };
            MODELS.into_iter().flat_map(of)
        };
        for (name, n, k) in shapes() {
            for m in TOKENS {
                layer(&name, [m, n, k]);
            }
        }
        // Two equations with the first one: what a tile's k takes, and what all else.
        add("forward", Of::Forward, "shallow", [8192, 8192, 896]);
        for (name, n, k) in shapes() {
            for m in DECODED {
                add("forward", Of::Forward, &name, [m, n, k]);
            }
        }
        all
    }

    /// Elements of the left operand, of `x` where it is the right one, of the weight, and of what
    /// comes out in bf16 and in f32.
    fn sizes(&self) -> [usize; 5] {
        let Product { of, m, n, k } = self.product;
        match of {
            Of::Forward if self.activated => [m * k, 0, n * k, m * n + m * n / 2, 0],
            Of::Forward => [m * k, 0, n * k, m * n, 0],
            Of::BackwardInput => [m * n, 0, n * k, m * k, 0],
            Of::BackwardWeight => [m * n, m * k, 0, 0, n * k],
        }
    }

    /// Bytes that are moved at least.
    fn bytes(&self) -> usize {
        let [left, right, weight, out, sum] = self.sizes();
        2 * (left + right + weight + out) + 8 * sum
    }
}

/// Who multiplies.
#[derive(Clone, Copy)]
enum Who {
    Warpo,
    CublasLt(Algorithm),
}

/// Memory for all jobs.
struct Lab {
    dev: Device,
    lt: Option<Lt>,
    left: Buffer<'static, bf16>,
    right: Buffer<'static, bf16>,
    out: Buffer<'static, bf16>,
    sum: Buffer<'static, f32>,
    /// Of the job that is measured, more than a cache holds.
    weights: Vec<Packed<bf16>>,
    calls: usize,
    /// Copies of half of `out` that keep the device busy while the host queues a round.
    ahead: usize,
}

/// Random numbers, the same million again and again, which no row of a matrix begins with twice.
fn random(dev: &Device, stream: u64, len: usize) -> Buffer<'static, bf16> {
    let draw = Philox::new(1, stream, 0, Purpose::Init);
    let some: Vec<bf16> = (0..1_000_003).map(|i| bf16::of(draw.normal(i))).collect();
    let mut all = Buffer::new(dev, "bench", len).unwrap();
    for from in (0..len).step_by(some.len()) {
        let part = &some[..some.len().min(len - from)];
        dev.write(all.view_mut().range(from..from + part.len()), part).unwrap();
    }
    all
}

/// Where call `call` has its `need` elements of `len`.
fn place(call: usize, need: usize, len: usize) -> Range<usize> {
    let from = call * need % (len - need + 1) / 64 * 64;
    from..from + need
}

impl Lab {
    fn new(b: &Bench, jobs: &[Job]) -> Self {
        let most = |i: usize| jobs.iter().map(|job| job.sizes()[i]).max().unwrap_or(0);
        let room = if b.tiny { 0 } else { ROUND / 2 };
        let (out, lt) = (most(3).max(room), Lt::new(b.cuda()));
        match &lt {
            Ok(lt) => println!("cuBLASLt {}", lt.version()),
            Err(e) => println!("products are measured alone: {e}"),
        }
        Self {
            dev: b.dev.clone(),
            lt: lt.ok(),
            left: random(&b.dev, 1, most(0).max(most(2)).max(room)),
            right: random(&b.dev, 2, most(1).max(room)),
            out: Buffer::zeros(&b.dev, "bench", out).unwrap(),
            sum: Buffer::zeros(&b.dev, "bench", most(4).max(room / 2)).unwrap(),
            weights: Vec::new(),
            calls: 0,
            ahead: if b.tiny { 0 } else { AHEAD.div_ceil(out) },
        }
    }

    fn prepare(&mut self, job: &Job) {
        let Product { n, k, .. } = job.product;
        self.weights.clear();
        for set in 0..(ROUND / (2 * n * k)).clamp(1, 160) {
            let mut w = Packed::new(&self.dev, n, k).unwrap();
            let from = place(set, n * k, self.left.len());
            w.pack(&self.dev, self.left.view().range(from)).unwrap();
            self.weights.push(w);
        }
    }

    fn call(&mut self, job: &Job, who: Who) -> Result<()> {
        let (dev, product, i) = (&self.dev, &job.product, self.calls);
        self.calls += 1;
        let [left, right, _, out, sum] = job.sizes();
        let w = &self.weights[i % self.weights.len()];
        let left = self.left.view().range(place(i, left, self.left.len()));
        let right = self.right.view().range(place(i, right, self.right.len()));
        let (out, sum) = (place(i, out, self.out.len()), place(i, sum, self.sum.len()));
        let (out, sum) = (self.out.view_mut().range(out), self.sum.view_mut().range(sum));
        let (n, k, m) = (product.n, product.k, product.m);
        match (who, product.of, &self.lt) {
            (Who::Warpo, Of::Forward, _) if job.activated => {
                let (up, y) = out.split_at(m * n);
                let epilogue = Epilogue { act: Activation::Silu, gated: true };
                matmul::activated(dev, epilogue, [y, up], left, w, None)
            }
            (Who::Warpo, Of::Forward, _) => matmul::forward(dev, out, left, w, None, None),
            (Who::Warpo, Of::BackwardInput, _) => {
                matmul::backward_input(dev, out, left, Weight::from(w).view(), (n, k))
            }
            (Who::Warpo, Of::BackwardWeight, _) => {
                matmul::backward_weight(dev, sum, None, left, right, (n, k))
            }
            (Who::CublasLt(algorithm), Of::BackwardWeight, Some(lt)) => {
                lt.product(product, &algorithm, sum, (left, right), true)
            }
            (Who::CublasLt(algorithm), _, Some(lt)) => {
                // The product alone, where there is an activation with it.
                let (out, _) = out.split_at(if product.of == Of::Forward { m * n } else { m * k });
                lt.product(product, &algorithm, out, (left, Weight::from(w).view()), false)
            }
            (Who::CublasLt(_), _, None) => Ok(()),
        }
    }

    /// Seconds of a call in a round of `calls`.
    fn round(&mut self, job: &Job, who: Who, calls: usize) -> Result<f64> {
        let Device::Cuda(cuda) = self.dev.clone() else { panic!("{:?}", self.dev) };
        let half = self.out.len() / 2;
        for _ in 0..self.ahead {
            let (to, from) = self.out.view_mut().split_at(half);
            self.dev.copy(to, from.view().range(0..half))?;
        }
        let took = cuda.time(|| (0..calls).try_for_each(|_| self.call(job, who)))?;
        Ok(took / calls as f64)
    }

    /// Calls that a round has, from one call that is not the first.
    fn calls(&mut self, job: &Job, who: Who) -> Result<usize> {
        self.round(job, who, 1)?;
        let once = self.round(job, who, 1)?;
        Ok((SECONDS / once).clamp(1.0, CALLS) as usize)
    }

    /// The fastest of cuBLASLt's algorithms, by time.
    fn best(&mut self, job: &Job) -> Option<Algorithm> {
        let all = self.lt.as_ref()?.algorithms(&job.product).unwrap();
        let timed = all.into_iter().filter_map(|algorithm| {
            let who = Who::CublasLt(algorithm);
            // What the library offers and then refuses does not count.
            let calls = self.calls(job, who).ok()?;
            Some((self.round(job, who, calls.div_ceil(4)).ok()?, algorithm))
        });
        timed.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, algorithm)| algorithm)
    }

    /// What a call gives, up to a million numbers of it.
    fn result(&mut self, job: &Job, who: Who) -> Vec<f32> {
        self.calls = 0;
        let (m, n, k) = (job.product.m, job.product.n, job.product.k);
        let some = |len: usize| 0..len.min(1 << 20);
        if job.product.of == Of::BackwardWeight {
            let zeros = vec![0.0; n * k];
            self.dev.write(self.sum.view_mut().range(0..n * k), &zeros).unwrap();
            self.call(job, who).unwrap();
            return self.dev.read(self.sum.view().range(some(n * k))).unwrap();
        }
        self.call(job, who).unwrap();
        let len = if job.product.of == Of::Forward { m * n } else { m * k };
        let out = self.dev.read(self.out.view().range(some(len))).unwrap();
        out.into_iter().map(bf16::to_f32).collect()
    }
}

/// Both computed the same: no number is further off than a rounding to bf16 of the largest.
fn check(name: &str, ours: &[f32], theirs: &[f32]) {
    let largest = theirs.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let same = |(a, b): (&f32, &f32)| (a - b).abs() <= largest / 128.0;
    assert!(largest > 0.0 && ours.iter().zip(theirs).all(same), "{name}: another product");
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Prints and keeps a line for each product.
pub fn products(b: &mut Bench) {
    let mut jobs = Job::all(b.tiny);
    jobs.retain(|job| b.wanted(&job.name));
    if jobs.is_empty() {
        return;
    }
    let mut lab = Lab::new(b, &jobs);
    for job in &jobs {
        lab.prepare(job);
        let mut both = vec![Who::Warpo];
        let best = lab.best(job);
        if let Some(best) = best {
            both.push(Who::CublasLt(best));
            let [ours, theirs] = [0, 1].map(|i| lab.result(job, both[i]));
            check(&job.name, &ours, &theirs);
        }
        let calls: Vec<usize> = both.iter().map(|who| lab.calls(job, *who).unwrap()).collect();
        let mut times = vec![Vec::new(); both.len()];
        for _ in 0..if b.tiny { 1 } else { ROUNDS } {
            for (i, who) in both.iter().enumerate() {
                times[i].push(lab.round(job, *who, calls[i]).unwrap());
            }
        }
        let times: Vec<f64> = times.into_iter().map(median).collect();
        let Product { m, n, k, .. } = job.product;
        let rate = |seconds: f64| 2.0 * (m * n * k) as f64 / seconds / 1e12;
        let gb = job.bytes() as f64 / times[0] / 1e9;
        let mut line = format!(
            "{:44} {:>9.1} us {:>7.1} TFLOP/s {gb:>6.0} GB/s, {:>4.0} % of a copy",
            job.name,
            times[0] * 1e6,
            rate(times[0]),
            100e9 * gb / b.copy
        );
        let mut result = json!({
            "name": job.name, "microseconds": times[0] * 1e6, "TFLOP/s": rate(times[0]),
            "bytes": job.bytes(), "GB/s": gb, "of a copy": 1e9 * gb / b.copy,
        });
        if let (Some(algorithm), Some(theirs)) = (best, times.get(1)) {
            line += &format!(
                "; cuBLASLt {:>9.1} us {:>7.1} TFLOP/s, ratio {:.3}",
                theirs * 1e6,
                rate(*theirs),
                theirs / times[0]
            );
            result["cublaslt us"] = json!(theirs * 1e6);
            result["cublaslt TFLOP/s"] = json!(rate(*theirs));
            result["cublaslt algorithm"] = json!(algorithm.to_string());
            result["cublaslt / Warpo"] = json!(theirs / times[0]);
        }
        println!("{line}");
        b.results.keep(result);
    }
}
