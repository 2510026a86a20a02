//! A mixture of experts, forward and backward: a naive one in f64, central differences, bits that
//! depend on neither batch nor micro-batches.

use warpo::{
    Result,
    device::{Buffer, Device, Element, Float, Scope},
    ops::{
        activation::{Activation, Glu},
        experts::{self, GluGrads, PairRows, Stack, StackGrads},
        matmul::{self, Packed},
        routing::{self, Router, Routes},
    },
};

use crate::support::{
    OP, assert_bits, assert_close, assert_earned, devices, gather, gradcheck, host, inner, narrow,
    randn, refusal, room, room_on, shuffled,
    sim::{self, Case, Lab, Sim, Variant},
    wide,
};

const SILU: Glu = Glu { act: Activation::Silu, limit: None };
/// gpt-oss's, with a limit that cuts off much.
const CLAMPED: Glu = Glu { act: Activation::QuickGelu, limit: Some(0.7) };

#[derive(Clone, Copy, Debug)]
struct Mixture {
    rows: usize,
    router: Router,
    /// Widths of a row, and inside an expert.
    hidden: usize,
    inner: usize,
    glu: Glu,
    bias: bool,
    /// Added to the logits of expert 0, and taken from those of expert 1.
    skew: f64,
}

const PLAIN: Mixture = Mixture {
    rows: 13,
    router: Router { experts: 5, top: 2, renormalised: true },
    hidden: 6,
    inner: 7,
    glu: SILU,
    bias: false,
    skew: 0.0,
};

impl Mixture {
    fn of(rows: usize, experts: usize, top: usize) -> Self {
        Self { rows, router: Router { experts, top, ..PLAIN.router }, ..PLAIN }
    }

    /// Lengths of all that goes in, and gets a gradient: x, logits, and weights and biases of both
    /// products.
    fn lens(&self) -> [usize; 6] {
        let Self { rows, router: Router { experts: e, .. }, hidden, inner, .. } = *self;
        [
            rows * hidden,
            rows * e,
            e * 2 * inner * hidden,
            e * 2 * inner,
            e * hidden * inner,
            e * hidden,
        ]
    }

    fn inputs<F: Float>(&self) -> [Vec<F>; 6] {
        let names = ["x", "logits", "w up", "b up", "w down", "b down"];
        let mut all: [Vec<F>; 6] = std::array::from_fn(|i| randn(names[i], self.lens()[i]));
        self.crowd(&mut all[1]);
        all
    }

    fn crowd<T: Element>(&self, logits: &mut [T]) {
        for z in logits.chunks_mut(self.router.experts).filter(|_| self.skew != 0.0) {
            z[0] = T::of(z[0].f64() + self.skew);
            z[1] = T::of(z[1].f64() - self.skew);
        }
    }
}

/// Buffers of a pass.
struct Room<'s, T: Element> {
    routes: Routes<'s, T::Acc>,
    up: Buffer<'s, T>,
    act: Buffer<'s, T>,
    /// A row for each pair.
    wide: Buffer<'s, T>,
    dact: Buffer<'s, T>,
    dup: Buffer<'s, T>,
    dweights: Buffer<'s, T::Acc>,
}

impl<'s, T: Element> Room<'s, T> {
    fn new(dev: &Device, scope: &'s Scope<'_>, m: &Mixture) -> Result<Self> {
        let pairs = m.rows * m.router.top;
        Ok(Self {
            routes: Routes::new(dev, scope, m.router, m.rows)?,
            up: scope.alloc("up", pairs * 2 * m.inner)?,
            act: scope.alloc("act", pairs * m.inner)?,
            wide: scope.alloc("wide", pairs * m.hidden)?,
            dact: scope.alloc("dact", pairs * m.inner)?,
            dup: scope.alloc("dup", pairs * 2 * m.inner)?,
            dweights: scope.alloc("dweights", pairs)?,
        })
    }
}

/// Inputs on a device.
struct Given<T: Element> {
    x: Buffer<'static, T>,
    logits: Buffer<'static, T::Acc>,
    /// Weights and biases of both products.
    stacks: [Buffer<'static, T>; 4],
    onto: Buffer<'static, T>,
    dy: Buffer<'static, T>,
}

/// `y = onto + sum of weights * down(glu(up(x)))`
fn forward<T: Element>(
    dev: &Device,
    m: &Mixture,
    given: &Given<T>,
    room: &mut Room<'_, T>,
    y: &mut Buffer<'_, T>,
) -> Result<()> {
    let Room { routes, up, act, wide, .. } = room;
    let (Mixture { hidden, inner, .. }, experts) = (*m, m.router.experts);
    let [w_up, b_up, w_down, b_down] = &given.stacks;
    let mut packed_up = Packed::stack(dev, experts, 2 * inner, hidden)?;
    packed_up.pack(dev, w_up.view())?;
    let mut packed_down = Packed::stack(dev, experts, hidden, inner)?;
    packed_down.pack(dev, w_down.view())?;
    let (up_bias, down_bias) = (m.bias.then(|| b_up.view()), m.bias.then(|| b_down.view()));
    dev.copy(routes.logits.view_mut(), given.logits.view())?;
    routing::forward(dev, routes)?;
    let x = PairRows::Gathered { x: given.x.view(), room: wide.view_mut() };
    let stack = Stack { weight: (&packed_up).into(), bias: up_bias };
    let to = [act.view_mut(), up.view_mut()];
    experts::activated(dev, routes, m.glu, to, x, stack)?;
    let stack = Stack { weight: (&packed_down).into(), bias: down_bias };
    experts::forward(dev, routes, wide.view_mut(), act.view(), stack)?;
    routing::combine(dev, routes, y.view_mut(), wide.view(), Some(given.onto.view()), true)
}

/// Adds to the gradients of the stacks, and writes those of x, onto what `dx` holds, and of the
/// logits.
fn backward<T: Element>(
    dev: &Device,
    m: &Mixture,
    given: &Given<T>,
    room: &mut Room<'_, T>,
    [dx, dlogits]: [&mut Buffer<'_, T>; 2],
    grads: &mut [Buffer<'static, T::Acc>; 4],
) -> Result<()> {
    let Room { routes, up, act, wide, dact, dup, dweights } = room;
    let Mixture { hidden, inner, glu, bias, .. } = *m;
    let [w_up, _, w_down, b_down] = &given.stacks;
    let [dw_up, db_up, dw_down, db_down] = grads;
    let (of_up, of_down) = ((2 * inner, hidden), (hidden, inner));
    let dy = PairRows::Gathered { x: given.dy.view(), room: wide.view_mut() };
    experts::backward_input(dev, routes, dact.view_mut(), dy, w_down.view(), of_down)?;
    let to = GluGrads { dact: dact.view_mut(), dup: dup.view_mut(), dweights: dweights.view_mut() };
    experts::glu_backward(dev, routes, glu, to, [act.view(), up.view()])?;
    if bias {
        let db = Some(db_down.view_mut());
        let (dy, b) = (given.dy.view(), b_down.view());
        experts::bias_backward(dev, routes, db, dweights.view_mut(), dy, b)?;
    }
    let dy = PairRows::Gathered { x: given.dy.view(), room: wide.view_mut() };
    let grads = StackGrads { dw: dw_down.view_mut(), dbias: None };
    experts::backward_weight(dev, routes, grads, dy, PairRows::Sorted(dact.view()), of_down)?;
    let x = PairRows::Gathered { x: given.x.view(), room: wide.view_mut() };
    let grads = StackGrads { dw: dw_up.view_mut(), dbias: bias.then(|| db_up.view_mut()) };
    experts::backward_weight(dev, routes, grads, PairRows::Sorted(dup.view()), x, of_up)?;
    let d = PairRows::Sorted(dup.view());
    experts::backward_input(dev, routes, wide.view_mut(), d, w_up.view(), of_up)?;
    routing::combine(dev, routes, dx.view_mut(), wide.view(), None, false)?;
    routing::backward(dev, routes, dlogits.view_mut(), dweights.view(), 0.0)
}

/// What a mixture makes of its inputs on the CPU.
struct Made<F> {
    y: Vec<F>,
    /// Of all inputs, in the order of [`Mixture::lens`].
    grads: [Vec<F>; 6],
}

/// Adds the mixture to `dy`, and gradients to `start`.
fn run_from<F: Float>(
    dev: &Device,
    m: &Mixture,
    inputs: &[Vec<F>; 6],
    dy: &[F],
    start: F,
) -> Made<F> {
    let of = |x: &[F]| Buffer::of(host(), "test", x).unwrap();
    let [x, logits, stacks @ ..] = inputs;
    let given = Given {
        x: of(x),
        logits: of(logits),
        stacks: std::array::from_fn(|i| of(&stacks[i])),
        onto: of(dy),
        dy: of(dy),
    };
    let mut arena = room(4 << 20);
    let scope = arena.scope();
    let mut room = Room::new(dev, &scope, m).unwrap();
    let mut y = scope.alloc("y", m.rows * m.hidden).unwrap();
    forward(dev, m, &given, &mut room, &mut y).unwrap();
    let mut dx = of(&vec![start; m.rows * m.hidden]);
    let mut dlogits = scope.alloc("dlogits", m.lens()[1]).unwrap();
    let mut grads = std::array::from_fn(|i| of(&vec![start; m.lens()[2 + i]]));
    backward(dev, m, &given, &mut room, [&mut dx, &mut dlogits], &mut grads).unwrap();
    let [a, b, c, d] = grads.map(|g| g.host().to_vec());
    let (dx, dlogits) = (dx.host().to_vec(), dlogits.host().to_vec());
    Made { y: y.host().to_vec(), grads: [dx, dlogits, a, b, c, d] }
}

fn run<F: Float>(dev: &Device, m: &Mixture, inputs: &[Vec<F>; 6], dy: &[F]) -> Made<F> {
    run_from(dev, m, inputs, dy, F::ZERO)
}

/// A row at a time, an expert at a time, as the formula reads; in f64, or in f32.
fn naive<F: Float>(
    m: &Mixture,
    [x, logits, w_up, b_up, w_down, b_down]: &[Vec<F>; 6],
    onto: &[F],
) -> Vec<F> {
    let Mixture {
        rows, router: Router { experts, top, renormalised }, hidden: h, inner: n, ..
    } = *m;
    let line = |w: &[F], b: &[F], i: usize, x: &[F]| {
        let sum = w[i * x.len()..][..x.len()].iter().zip(x).fold(F::ZERO, |s, (w, x)| s + *w * *x);
        if m.bias { sum + b[i] } else { sum }
    };
    let sigmoid = |x: F| F::ONE / (F::ONE + (-x).exp());
    let mut y = onto.to_vec();
    for r in 0..rows {
        let z = &logits[r * experts..][..experts];
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|a, b| z[*b].f64().total_cmp(&z[*a].f64()));
        let of = if renormalised { &order[..top] } else { &order[..] };
        let all = of.iter().fold(F::ZERO, |s, e| s + z[*e].exp());
        for e in &order[..top] {
            let up: Vec<F> =
                (0..2 * n).map(|i| line(w_up, b_up, e * 2 * n + i, &x[r * h..][..h])).collect();
            let act = |i: usize| match m.glu.limit {
                None => up[i] * sigmoid(up[i]) * up[n + i],
                Some(limit) => {
                    let limit = F::of(f64::from(limit));
                    let (g, u) = (up[i].min(limit), up[n + i].clamp(-limit, limit));
                    (u + F::ONE) * g * sigmoid(F::of(1.702) * g)
                }
            };
            let act: Vec<F> = (0..n).map(act).collect();
            for c in 0..h {
                y[r * h + c] += z[*e].exp() / all * line(w_down, b_down, e * h + c, &act);
            }
        }
    }
    y
}

/// Shapes: one of everything, one expert a row and all, experts without rows, all rows at one.
fn mixtures() -> Vec<Mixture> {
    let over_all = Router { renormalised: false, ..PLAIN.router };
    vec![
        Mixture { hidden: 1, inner: 1, ..Mixture::of(1, 1, 1) },
        PLAIN,
        Mixture { router: over_all, ..PLAIN },
        Mixture { glu: CLAMPED, bias: true, ..PLAIN },
        Mixture { bias: true, ..Mixture::of(9, 4, 1) },
        Mixture { bias: true, ..Mixture::of(6, 4, 4) },
        Mixture { glu: CLAMPED, ..Mixture::of(3, 16, 2) },
        Mixture { skew: 50.0, bias: true, ..Mixture::of(11, 4, 1) },
        Mixture { hidden: 40, inner: 33, ..Mixture::of(30, 3, 2) },
    ]
}

#[test]
fn it_is_what_the_formula_says() {
    for m in mixtures() {
        let (inputs, dy) = (m.inputs::<f64>(), randn::<f64>("dy", m.rows * m.hidden));
        let made = run(&Device::cpu(), &m, &inputs, &dy);
        assert_close(&format!("{m:?}"), &made.y, &naive(&m, &inputs, &dy), 1e-12, 1e-12);
        let inputs32 = inputs.each_ref().map(|x| narrow(x));
        let dy = narrow(&dy);
        let truth = naive(&m, &inputs32.each_ref().map(|x| wide(x)), &wide(&dy));
        let made = run(&Device::cpu(), &m, &inputs32, &dy);
        assert_earned(&format!("{m:?}"), &made.y, &naive(&m, &inputs32, &dy), &truth);
    }
}

#[test]
fn gradients() {
    for m in mixtures().into_iter().filter(|m| m.hidden * m.inner < 100) {
        let (inputs, dy) = (m.inputs::<f64>(), randn::<f64>("dy", m.rows * m.hidden));
        let made = run_from(&Device::cpu(), &m, &inputs, &dy, 0.25);
        for (i, name) in ["x", "logits", "w up", "b up", "w down", "b down"].iter().enumerate() {
            let added = if i == 1 { 0.0 } else { 0.25 };
            let grad: Vec<f64> = made.grads[i].iter().map(|d| d - added).collect();
            let mut inputs = inputs.clone();
            let at = inputs[i].clone();
            gradcheck(&format!("{name} of {m:?}"), &at, &grad, OP, |x| {
                inputs[i].copy_from_slice(x);
                inner(&naive(&m, &inputs, &dy), &dy)
            });
        }
    }
}

/// Expert 1 is nobody's choice: nothing is added to its gradients, not even a 0.
#[test]
fn an_expert_without_rows_has_no_gradient() {
    let m = Mixture { skew: 50.0, bias: true, ..Mixture::of(11, 4, 2) };
    let (inputs, dy) = (m.inputs::<f32>(), randn::<f32>("dy", m.rows * m.hidden));
    let made = run_from(&Device::cpu(), &m, &inputs, &dy, -0.0);
    for (i, g) in made.grads[2..].iter().enumerate() {
        let each = g.len() / 4;
        let mine = &g[each..2 * each];
        assert_bits("untouched", mine, &vec![-0.0; each]);
        assert!(g[..each].iter().all(|d| *d != 0.0), "{i}: all rows are at expert 0");
    }
}

/// Tasks of products have 48 rows at least, panels 32 columns.
#[test]
fn rows_do_not_see_their_batch() {
    let all = 101;
    let m = Mixture { hidden: 35, inner: 19, bias: true, ..Mixture::of(all, 4, 2) };
    let (inputs, dy) = (m.inputs::<f32>(), randn::<f32>("dy", all * m.hidden));
    let h = m.hidden;
    let whole = run(&devices()[0], &m, &inputs, &dy);
    let order = shuffled("order", all);
    for dev in devices() {
        for rows in [0, 1, 2, 47, 100] {
            let part = Mixture { rows, ..m };
            let mut cut = inputs.clone();
            cut[0] = inputs[0][(all - rows) * h..].to_vec();
            cut[1] = inputs[1][(all - rows) * 4..].to_vec();
            let made = run(&dev, &part, &cut, &dy[(all - rows) * h..]);
            let what = format!("{rows} {dev:?}");
            assert_bits(&what, &made.y, &whole.y[(all - rows) * h..]);
            assert_bits(&what, &made.grads[0], &whole.grads[0][(all - rows) * h..]);
            assert_bits(&what, &made.grads[1], &whole.grads[1][(all - rows) * 4..]);
        }
        let mut turned = inputs.clone();
        turned[0] = gather(&inputs[0], h, &order);
        turned[1] = gather(&inputs[1], 4, &order);
        let made = run(&dev, &m, &turned, &gather(&dy, h, &order));
        assert_bits("permuted", &made.y, &gather(&whole.y, h, &order));
        assert_bits("permuted", &made.grads[0], &gather(&whole.grads[0], h, &order));
        assert_bits("permuted", &made.grads[1], &gather(&whole.grads[1], 4, &order));
        let again = run(&dev, &m, &inputs, &dy);
        assert_bits("y", &again.y, &whole.y);
        for (a, b) in again.grads.iter().zip(&whole.grads) {
            assert_bits("gradients", a, b);
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let (dev, mut arena) = (Device::cpu(), room(1 << 16));
    let scope = arena.scope();
    let router = Router { experts: 2, top: 1, renormalised: true };
    let mut routes = Routes::<f32>::new(&dev, &scope, router, 3).unwrap();
    routes.logits.host_mut().fill(0.0);
    routing::forward(&dev, &mut routes).unwrap();
    let packed = Packed::stack(&dev, 2, 4, 5).unwrap();
    let (mut out, x) = (vec![0.0f32; 40], vec![0.0f32; 40]);
    let stack = Stack { weight: (&packed).into(), bias: None };
    let e = experts::forward(&dev, &routes, (&mut out[..11]).into(), x[..15].into(), stack);
    assert_eq!(refusal(e), "experts: `y` has shape [11], wanted [3, 4]");
    let e = experts::forward(&dev, &routes, (&mut out[..12]).into(), x[..14].into(), stack);
    assert_eq!(refusal(e), "experts: `x` has shape [14], wanted [3, 5]");
    let biased = Stack { bias: Some(x[..7].into()), ..stack };
    let e = experts::forward(&dev, &routes, (&mut out[..12]).into(), x[..15].into(), biased);
    assert_eq!(refusal(e), "experts: `bias` has shape [7], wanted [2, 4]");
    let one = Packed::new(&dev, 4, 5).unwrap();
    let alone = Stack { weight: (&one).into(), bias: None };
    let e = experts::forward(&dev, &routes, (&mut out[..12]).into(), x[..15].into(), alone);
    assert_eq!(refusal(e), "experts: weights: got 1, wanted 2");
    let e = matmul::forward(&dev, (&mut out[..4]).into(), x[..5].into(), &packed, None, None);
    assert_eq!(refusal(e), "matmul: weights: got 2, wanted 1");
    let dy = PairRows::Sorted(x[..12].into());
    let to = (&mut out[..15]).into();
    let e = experts::backward_input(&dev, &routes, to, dy, x[..39].into(), (4, 5));
    assert_eq!(refusal(e), "experts::backward_input: `w` has shape [39], wanted [2, 4, 5]");
    let (dy, x) = (PairRows::Sorted(x[..12].into()), PairRows::Sorted(x[..14].into()));
    let grads = StackGrads { dw: (&mut out[..40]).into(), dbias: None };
    let e = experts::backward_weight(&dev, &routes, grads, dy, x, (4, 5));
    assert_eq!(refusal(e), "experts::backward_weight: `x` has shape [14], wanted [3, 5]");
}

impl Case for Mixture {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let Self { rows, hidden, inner, .. } = *self;
        let (dev, experts) = (lab.dev(), self.router.experts);
        let logits = lab.rows::<T::Acc>("logits", rows, experts);
        let mut z = dev.read(logits.view())?;
        self.crowd(&mut z);
        let given = Given {
            x: lab.rows::<T>("x", rows, hidden),
            logits: Buffer::of(dev, "test", &z)?,
            stacks: [
                lab.input::<T>("w up", experts * 2 * inner * hidden),
                lab.input::<T>("b up", experts * 2 * inner),
                lab.input::<T>("w down", experts * hidden * inner),
                lab.input::<T>("b down", experts * hidden),
            ],
            onto: lab.rows::<T>("onto", rows, hidden),
            dy: lab.rows::<T>("dy", rows, hidden),
        };
        let mut arena = room_on(dev, 16 << 20);
        let scope = arena.scope();
        let mut room = Room::new(dev, &scope, self)?;
        let mut y = lab.room::<T>(rows * hidden);
        forward(dev, self, &given, &mut room, &mut y)?;
        lab.by_row("y", &y);
        let mut dx = lab.rows::<T>("dx", rows, hidden);
        let stride = matmul::width(dev, experts);
        let mut dlogits = lab.room::<T>(rows * stride);
        let grads = self.lens();
        let mut grads: [Buffer<'static, T::Acc>; 4] =
            std::array::from_fn(|i| lab.input("grad", grads[2 + i]));
        backward(dev, self, &given, &mut room, [&mut dx, &mut dlogits], &mut grads)?;
        lab.by_row("dx", &dx);
        let d = dev.read(dlogits.view())?;
        let d: Vec<T> = d.chunks(stride).flat_map(|d| d[..experts].to_vec()).collect();
        lab.by_row("dlogits", &Buffer::of(dev, "test", &d)?);
        for (name, grad) in ["dw up", "db up", "dw down", "db down"].into_iter().zip(&grads) {
            lab.sum_of::<T>(name, grad);
        }
        Ok(())
    }
}

/// Each product alone, of inputs that are rounded already.
struct Products(Mixture);

impl Case for Products {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let (m, dev) = (&self.0, lab.dev());
        let Mixture { rows, router: Router { experts, top, .. }, hidden: h, inner: n, .. } = *m;
        let pairs = rows * top;
        let mut arena = room_on(dev, 16 << 20);
        let scope = arena.scope();
        let mut routes = Routes::new(dev, &scope, m.router, rows)?;
        let logits = lab.rows::<T::Acc>("logits", rows, experts);
        let mut z = dev.read(logits.view())?;
        m.crowd(&mut z);
        dev.write(routes.logits.view_mut(), &z)?;
        routing::forward(dev, &mut routes)?;
        let (x, sorted) = (lab.rows::<T>("x", rows, h), lab.input::<T>("sorted", pairs * n));
        let (w, b) = (lab.input::<T>("w", experts * n * h), lab.input::<T>("b", experts * n));
        let mut wide = lab.room::<T>(pairs * h);
        let mut packed = Packed::stack(dev, experts, n, h)?;
        packed.pack(dev, w.view())?;
        let (weight, bias) = ((&packed).into(), m.bias.then(|| b.view()));
        let mut y = lab.room::<T>(pairs * n);
        let all = lab.input::<T>("all", pairs * h);
        if m.glu.limit.is_some() {
            let (mut act, mut up) = (lab.room::<T>(pairs * n / 2), lab.room::<T>(pairs * n));
            let x = PairRows::Gathered { x: x.view(), room: wide.view_mut() };
            let to = [act.view_mut(), up.view_mut()];
            experts::activated(dev, &routes, m.glu, to, x, Stack { weight, bias })?;
            lab.sum("act", &act);
            lab.sum("up", &up);
        }
        experts::forward(dev, &routes, y.view_mut(), all.view(), Stack { weight, bias })?;
        lab.sum("y", &y);
        let mut dx = lab.room::<T>(pairs * h);
        let dy = PairRows::Sorted(sorted.view());
        experts::backward_input(dev, &routes, dx.view_mut(), dy, w.view(), (n, h))?;
        lab.sum("dx", &dx);
        let mut dw = lab.input::<T::Acc>("dw", experts * n * h);
        let mut db = lab.input::<T::Acc>("db", experts * n);
        let grads = StackGrads { dw: dw.view_mut(), dbias: m.bias.then(|| db.view_mut()) };
        let x = PairRows::Gathered { x: x.view(), room: wide.view_mut() };
        let dy = PairRows::Sorted(sorted.view());
        experts::backward_weight(dev, &routes, grads, dy, x, (n, h))?;
        lab.sum_of_chain("dw", &dw, rows);
        lab.sum_of_chain("db", &db, rows);
        let router = lab.input::<T>("router", experts * h);
        let mut packed = Packed::new(dev, experts, h)?;
        packed.pack(dev, router.view())?;
        let bias = lab.input::<T>("router bias", experts);
        let (weight, bias) = ((&packed).into(), m.bias.then(|| bias.view()));
        let (x, mut z) = (lab.rows::<T>("x", rows, h), lab.room::<T::Acc>(rows * experts));
        experts::scores(dev, z.view_mut(), x.view(), Stack { weight, bias })?;
        lab.sum_of_chain("scores", &z, h);
        Ok(())
    }
}

/// What has kernels for f32, too.
struct Flat(Mixture);

impl Case for Flat {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let (m, dev) = (&self.0, lab.dev());
        let Mixture { rows, router: Router { experts, top, .. }, hidden: h, inner: n, glu, .. } =
            *m;
        let pairs = rows * top;
        let mut arena = room_on(dev, 4 << 20);
        let scope = arena.scope();
        let mut routes = Routes::new(dev, &scope, m.router, rows)?;
        let logits = lab.rows::<T::Acc>("logits", rows, experts);
        dev.copy(routes.logits.view_mut(), logits.view())?;
        routing::forward(dev, &mut routes)?;
        let (act, up) = (lab.input::<T>("act", pairs * n), lab.input::<T>("up", pairs * 2 * n));
        let (mut dact, mut dup) = (lab.input::<T>("dact", pairs * n), lab.room::<T>(pairs * 2 * n));
        let mut dweights = lab.room::<T::Acc>(pairs);
        let to =
            GluGrads { dact: dact.view_mut(), dup: dup.view_mut(), dweights: dweights.view_mut() };
        experts::glu_backward(dev, &routes, glu, to, [act.view(), up.view()])?;
        lab.sum("dact", &dact);
        lab.sum("dup", &dup);
        lab.sum("dweights", &dweights);
        let (dy, bias) = (lab.rows::<T>("dy", rows, h), lab.input::<T>("bias", experts * h));
        let mut db = lab.input::<T::Acc>("db", experts * h);
        let (to, d) = (Some(db.view_mut()), dweights.view_mut());
        experts::bias_backward(dev, &routes, to, d, dy.view(), bias.view())?;
        lab.sum("dweights of bias", &dweights);
        lab.sum("db", &db);
        Ok(())
    }
}

/// On sm_80, and on Hopper, which has the same kernels.
fn both(sim: &Sim, test: impl Fn(&Sim)) {
    test(sim);
    if sim.variant == Variant::Plain {
        test(&sim.hopper());
    }
}

/// Every tile, with edges of rows, columns and k; experts without rows, one with all.
fn on_devices() -> Vec<Mixture> {
    let of = |rows, experts, top, hidden, inner| Mixture {
        hidden,
        inner,
        ..Mixture::of(rows, experts, top)
    };
    vec![
        of(0, 4, 2, 8, 8),
        of(1, 1, 1, 8, 8),
        Mixture { bias: true, glu: CLAMPED, ..of(5, 16, 2, 24, 16) },
        of(20, 4, 4, 40, 72),
        // More experts than lanes.
        of(50, 70, 2, 8, 16),
        Mixture { bias: true, ..of(70, 3, 1, 136, 40) },
        Mixture { skew: 50.0, bias: true, glu: CLAMPED, ..of(140, 4, 1, 72, 48) },
        of(300, 2, 2, 72, 136),
    ]
}

#[test]
fn kernels_multiply_as_exactly_as_plain_ones() {
    sim::check(|sim| {
        both(sim, |sim| on_devices().into_iter().for_each(|m| sim.hold_bf16(&Products(m))));
    });
}

#[test]
fn kernels_of_a_mixture_are_as_exact_as_plain_ones() {
    // What is cut off in f64 need not be in bf16: here nothing is.
    let glu = |glu: Glu| Glu { limit: glu.limit.map(|_| 1e4), ..glu };
    sim::check(|sim| {
        on_devices().into_iter().for_each(|m| sim.hold_bf16(&Mixture { glu: glu(m.glu), ..m }));
    });
}

#[test]
fn kernels_of_gates_and_biases_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (glu, h, n) in [(SILU, 8, 24), (CLAMPED, 13, 5), (CLAMPED, 40, 256)] {
            let m = Mixture { hidden: h, inner: n, glu, ..Mixture::of(19, 5, 2) };
            sim.hold(&Flat(m));
        }
    });
}

/// 200 rows take the widest tiles, one the narrowest.
#[test]
fn kernel_rows_do_not_see_their_batch() {
    sim::check(|sim| {
        for (experts, top, glu) in [(2, 2, SILU), (6, 2, CLAMPED)] {
            let wide = Mixture { hidden: 72, inner: 40, glu, bias: true, ..PLAIN };
            sim.hold_rows_bf16(200, |rows| Mixture {
                rows,
                router: Router { experts, top, renormalised: true },
                ..wide
            });
        }
    });
}
