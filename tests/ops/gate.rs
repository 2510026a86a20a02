//! Columns of wider rows, copied and gated: hand-worked rows, central differences, what stands
//! beside them, bits.

use warpo::{
    Result,
    device::{Buffer, Device, Element},
    ops::gate::{self, Gate, Strided},
};

use crate::support::{
    OP, assert_bits, assert_close, devices, gradcheck, host, inner, randn, refusal,
    sim::{self, Case, Lab},
};

const ALL: [Gate; 3] = [Gate::Silu, Gate::Sigmoid, Gate::Identity];

fn at<V>(data: V, first: usize, stride: usize) -> Strided<V> {
    Strided { data, first, stride }
}

#[test]
fn hand_worked() {
    let (ln3, mut y) = (3f64.ln(), [9.0; 6]);
    let (x, g) = ([0.0, 4.0, 0.0, -8.0], [ln3, -ln3]);
    // s(ln 3) = 3 / 4.
    for (act, want) in [
        (Gate::Silu, [3.0 * ln3, 2.0 * ln3]),
        (Gate::Sigmoid, [3.0, -2.0]),
        (Gate::Identity, [4.0 * ln3, 8.0 * ln3]),
    ] {
        let (to, x, g) =
            (at((&mut y[..]).into(), 2, 3), at(x[..].into(), 1, 2), at(g[..].into(), 0, 1));
        gate::forward(host(), act, to, x, g, 1).unwrap();
        assert_close("y", &y, &[9.0, 9.0, want[0], 9.0, 9.0, want[1]], 0.0, 1e-15);
    }
    let mut y = [9.0f32; 6];
    let (to, x) = (at((&mut y[..]).into(), 0, 3), [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    gate::copy(host(), to, at(x[..].into(), 1, 3), 2).unwrap();
    assert_eq!(y, [2.0, 3.0, 9.0, 5.0, 6.0, 9.0]);
}

#[test]
fn gradients() {
    let (rows, cols) = (5, 3);
    let [x, g, dy]: [Vec<f64>; 3] =
        [("x", 7), ("g", 4), ("dy", 3)].map(|(n, c)| randn(n, rows * c));
    for act in ALL {
        let forward = |x: &[f64], g: &[f64]| {
            let mut y = vec![0.0; rows * cols];
            let to = Strided::dense((&mut y).into(), cols);
            gate::forward(host(), act, to, at(x.into(), 2, 7), at(g.into(), 1, 4), cols).unwrap();
            y
        };
        let (mut dx, mut dg) = (vec![0.0; x.len()], vec![0.0; g.len()]);
        let (to, dense) = (at((&mut dx).into(), 2, 7), Strided::dense((&dy).into(), cols));
        gate::forward(host(), act, to, dense, at((&g).into(), 1, 4), cols).unwrap();
        let (to, inputs) =
            (at((&mut dg).into(), 1, 4), [at((&x).into(), 2, 7), at((&g).into(), 1, 4)]);
        gate::backward(host(), act, to, (&dy).into(), inputs, cols).unwrap();
        gradcheck("x", &x, &dx, OP, |x| inner(&forward(x, &g), &dy));
        gradcheck("g", &g, &dg, OP, |g| inner(&forward(&x, g), &dy));
    }
}

/// sigmoid(ln 3) = 3 / 4, and its derivative 3 / 16.
#[test]
fn a_gate_for_each_row() {
    let (ln3, x) = (3f64.ln(), [4.0, 8.0, -4.0, 12.0]);
    let (mut y, mut dy, mut dg) = ([9.0; 4], [1.0, 2.0, 4.0, 8.0], [9.0; 2]);
    let g = [ln3, -ln3];
    gate::rows(host(), y[..].as_mut().into(), x[..].into(), g[..].into()).unwrap();
    assert_close("y", &y, &[3.0, 6.0, -1.0, 3.0], 0.0, 1e-15);
    let to = (dy[..].as_mut().into(), dg[..].as_mut().into());
    gate::rows_backward(host(), to.0, to.1, x[..].into(), g[..].into()).unwrap();
    assert_close("dx", &dy, &[0.75, 1.5, 1.0, 2.0], 0.0, 1e-15);
    assert_close("dg", &dg, &[3.75, 15.0], 0.0, 1e-15);

    let [x, g, dy]: [Vec<f64>; 3] =
        [("x", 35), ("g", 5), ("dy", 35)].map(|(name, n)| randn(name, n));
    let forward = |x: &[f64], g: &[f64]| {
        let mut y = vec![0.0; 35];
        gate::rows(host(), (&mut y).into(), x.into(), g.into()).unwrap();
        y
    };
    let (mut dx, mut dg) = (dy.clone(), vec![0.0; 5]);
    let to = ((&mut dx).into(), (&mut dg).into());
    gate::rows_backward(host(), to.0, to.1, (&x).into(), (&g).into()).unwrap();
    gradcheck("x", &x, &dx, OP, |x| inner(&forward(x, &g), &dy));
    gradcheck("g", &g, &dg, OP, |g| inner(&forward(&x, g), &dy));

    let (mut y, x, g) = ([0.0f32; 6], [0.0f32; 5], [0.0f32; 2]);
    let e = refusal(gate::rows(host(), y[..].as_mut().into(), x[..].into(), g[..].into()));
    assert!(e.contains("gate::rows") && e.contains("`x`"), "{e}");
    let e = refusal(gate::rows(host(), y[..5].as_mut().into(), x[..].into(), g[..].into()));
    assert!(e.contains("gate::rows") && e.contains("`y`"), "{e}");
}

#[test]
fn rows_do_not_see_their_batch() {
    let (rows, cols) = (300, 40);
    let [x, g]: [Vec<f32>; 2] = ["x", "g"].map(|name| randn(name, rows * cols));
    let run = |dev: &Device, from: usize, act| {
        let mut y = vec![0.0; (rows - from) * cols];
        let [x, g] = [&x, &g].map(|x| Strided::dense(x[from * cols..].into(), cols));
        gate::forward(dev, act, Strided::dense((&mut y).into(), cols), x, g, cols).unwrap();
        y
    };
    for act in ALL {
        let whole = run(&devices()[0], 0, act);
        for dev in devices() {
            for from in [0, 1, 102, 103, 299] {
                assert_bits("y", &run(&dev, from, act), &whole[from * cols..]);
            }
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let (mut y, x) = ([0.0f32; 6], [0.0f32; 8]);
    let mut run = |y_at: (usize, usize), x_at: (usize, usize)| {
        let (to, x) = (at((&mut y[..]).into(), y_at.0, y_at.1), at(x[..].into(), x_at.0, x_at.1));
        refusal(gate::copy(host(), to, x, 2))
    };
    let e = run((2, 3), (0, 4));
    assert_eq!(
        e,
        "gate::copy: elements of `y` from column 2: got 6, wanted rows of 3 that hold 2 columns there"
    );
    let e = run((0, 3), (0, 3));
    assert_eq!(
        e,
        "gate::copy: elements of `x` from column 0: got 8, wanted rows of 3 that hold 2 columns there"
    );
    assert_eq!(run((0, 3), (0, 2)), "gate::copy: rows of `x`: got 4, wanted 2");
}

struct Gated {
    rows: usize,
    cols: usize,
}

impl Case for Gated {
    fn run<T: Element>(&self, lab: &mut Lab<'_>) -> Result<()> {
        let Self { rows, cols } = *self;
        let (dev, wide) = (lab.dev(), cols + 5);
        let (x, g) = (lab.rows::<T>("x", rows, wide), lab.rows::<T>("g", rows, cols + 1));
        let dy = lab.rows::<T>("dy", rows, cols);
        let [x, g] = [at(x.view(), 4, wide), at(g.view(), 1, cols + 1)];
        let room = || Buffer::<T>::zeros(dev, "test", rows * wide);
        for act in ALL {
            let (mut y, mut dg) = (room()?, room()?);
            gate::forward(dev, act, at(y.view_mut(), 3, wide), x, g, cols)?;
            lab.by_row("y", &y);
            gate::backward(dev, act, at(dg.view_mut(), 5, wide), dy.view(), [x, g], cols)?;
            lab.by_row("dg", &dg);
        }
        let mut y = room()?;
        gate::copy(dev, at(y.view_mut(), 0, wide), x, cols)?;
        lab.by_row("copy", &y);
        let x = lab.rows::<T>("values", rows, cols);
        let g = lab.rows::<T::Acc>("gates", rows, 1);
        let (mut y, mut d) = (lab.room::<T>(rows * cols), lab.rows::<T>("dy", rows, cols));
        let mut dg = lab.room::<T::Acc>(rows);
        gate::rows(dev, y.view_mut(), x.view(), g.view())?;
        lab.by_row("rows", &y);
        gate::rows_backward(dev, d.view_mut(), dg.view_mut(), x.view(), g.view())?;
        lab.by_row("rows, dx", &d);
        lab.by_row("rows, dg", &dg);
        Ok(())
    }
}

#[test]
fn kernels_are_as_exact_as_plain_ones() {
    sim::check(|sim| {
        for (rows, cols) in [(0, 3), (1, 1), (37, 24), (9, 130)] {
            sim.hold(&Gated { rows, cols });
        }
        sim.hold_rows(37, |rows| Gated { rows, cols: 24 });
    });
}
