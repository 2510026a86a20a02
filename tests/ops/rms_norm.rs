//! RMSNorm: hand-worked values, central differences, and bits that do not depend on the batch.

use warpo::{device::Device, ops::rms_norm};

use crate::support::{OP, assert_bits, assert_close, devices, gradcheck, inner, randn};

fn run(x: &[f64], w: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; x.len() / w.len()]);
    let dev = Device::cpu();
    rms_norm::forward(&dev, (&mut y).into(), (&mut rstd).into(), x.into(), w.into(), 1e-5).unwrap();
    (y, rstd)
}

#[test]
fn hand_worked() {
    // mean square of (3, 4) is 12.5
    let (y, rstd) = run(&[3.0, 4.0], &[1.0, -2.0]);
    let r = 1.0 / 12.500_01f64.sqrt();
    assert_close("rstd", &rstd, &[r], 0.0, 1e-15);
    assert_close("y", &y, &[3.0 * r, -8.0 * r], 0.0, 1e-15);
}

#[test]
fn gradients() {
    for (rows, cols) in [(1, 1), (3, 7), (5, 33)] {
        let x: Vec<f64> = randn("x", rows * cols);
        let w: Vec<f64> = randn("w", cols);
        let dy: Vec<f64> = randn("dy", rows * cols);
        let (_, rstd) = run(&x, &w);
        let mut dx = vec![f64::NAN; x.len()];
        let mut dw = vec![0.5; cols]; // the gradient is added to what is there
        rms_norm::backward(
            &Device::cpu(),
            (&mut dx).into(),
            (&mut dw).into(),
            (&dy).into(),
            (&x).into(),
            (&w).into(),
            (&rstd).into(),
        )
        .unwrap();
        dw.iter_mut().for_each(|d| *d -= 0.5);
        gradcheck("dx", &x, &dx, OP, |x| inner(&run(x, &w).0, &dy));
        gradcheck("dw", &w, &dw, OP, |w| inner(&run(&x, w).0, &dy));
    }
}

#[test]
fn rows_do_not_see_their_batch() {
    let (rows, cols) = (37, 50);
    let x: Vec<f32> = randn("x", rows * cols);
    let w: Vec<f32> = randn("w", cols);
    let mut want: Option<Vec<f32>> = None;
    for dev in devices() {
        for start in [0, 5] {
            let x = &x[start * cols..];
            let (mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; rows - start]);
            let (y_, r_) = ((&mut y).into(), (&mut rstd).into());
            rms_norm::forward(&dev, y_, r_, x.into(), (&w).into(), 1e-5).unwrap();
            let want = want.get_or_insert_with(|| y.clone());
            assert_bits(&format!("{dev:?}"), &y, &want[start * cols..]);
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let mut y = vec![0.0f32; 6];
    let mut rstd = vec![0.0f32; 2];
    let (x, w) = (vec![0.0f32; 5], vec![0.0f32; 3]);
    let e = rms_norm::forward(
        &Device::cpu(),
        (&mut y).into(),
        (&mut rstd).into(),
        (&x).into(),
        (&w).into(),
        1e-5,
    )
    .unwrap_err();
    assert_eq!(e.to_string(), "rms_norm: `x` has shape [5], wanted [2, 3]");
}
