//! The CUDA device on the simulator: seeded mistakes are found by the tool that should find them,
//! and what reaches a launch is checked.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
};

use half::bf16;
use warpo::{
    Result,
    device::{
        Arena, Buffer, Cuda, Device, View,
        cuda::{Launch, Order, kernels::rms_norm as kernel},
    },
    ops::matmul,
};

use crate::support::{
    refusal,
    sim::{self, Sim, Variant},
};

type Alloc = unsafe extern "C" fn(usize) -> *mut u8;
type Free = unsafe extern "C" fn(*mut u8) -> c_int;
type Text = unsafe extern "C" fn() -> *const c_char;
type Threads = unsafe extern "C" fn(*const c_char) -> u32;
type Run = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    *const u32,
    usize,
    *mut *mut c_void,
    u64,
    u64,
    c_int,
) -> c_int;

/// A kernel of `faults.cu`, run with its mistake or without: what is wrong with its output, or why it
/// was stopped. These kernels are no part of the product, so they have no Rust function.
#[allow(unsafe_code, clippy::multiple_unsafe_ops_per_block)]
fn fault(sim: &Sim, name: &str, seeded: bool) -> Option<String> {
    let n = 256;
    // Whole numbers, so that every sum is exact; a few more, for packets that begin too late.
    let x: Vec<f32> = (0..n + 4).map(|i| (i * i % 17) as f32 - 5.0).collect();
    let half: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
    let mma = name == "wrong_fragment";
    let bytes: &[u8] = if mma { bytemuck::cast_slice(&half) } else { bytemuck::cast_slice(&x) };
    let mut y = vec![0.0f32; n];
    let entry = CString::new(format!("fault_{name}")).unwrap();
    let mut seeded = c_int::from(seeded);
    // SAFETY: the library that this test built: its symbols have the types above, and the kernels take
    // an output, one input (or two of bf16) and an int, each buffer at most as large as these.
    unsafe {
        let library = libloading::Library::new(sim.library()).unwrap();
        let alloc = library.get::<Alloc>("sim_alloc").unwrap();
        let mut device = [0; 3].map(|_| alloc(4 * (n + 4)));
        for d in &device[1..] {
            d.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        let mut args: Vec<*mut c_void> = device.iter_mut().map(|d| (&raw mut *d).cast()).collect();
        args.truncate(if mma { 3 } else { 2 });
        args.push((&raw mut seeded).cast());
        let blocks = [if name == "global_race" { 2 } else { 1 }, 1, 1];
        let threads = library.get::<Threads>("sim_threads").unwrap()(entry.as_ptr());
        let (size, shared) = ([threads, 1, 1], 1024);
        let run = library.get::<Run>("sim_launch").unwrap();
        let (entry, args) = (entry.as_ptr(), args.as_mut_ptr());
        if run(entry, blocks.as_ptr(), size.as_ptr(), shared, args, 0, 0, 0) != 0 {
            let text = library.get::<Text>("sim_error").unwrap()();
            return Some(CStr::from_ptr(text).to_str().unwrap().to_owned());
        }
        device[0].copy_to_nonoverlapping(y.as_mut_ptr().cast(), 4 * n);
        let free = library.get::<Free>("sim_free").unwrap();
        for d in device {
            assert_eq!(free(d), 0, "device memory was written outside its bounds");
        }
    }
    let sum = |x: &[f32]| x.iter().sum::<f32>();
    let want: Vec<f32> = match name {
        "missing_barrier" => x[..256].iter().rev().copied().collect(),
        "wrong_lane" => vec![sum(&x[..32]); 32],
        "missing_wait" | "misaligned_packet" => x[..128].to_vec(),
        "off_by_one" | "divergent_barrier" | "unwritten_output" => x[..64].to_vec(),
        "global_race" => vec![sum(&x[..64]), sum(&x[64..128])],
        "wrong_fragment" => {
            let dot = |i: usize, j: usize| (0..16).map(|k| x[i * 16 + k] * x[j * 16 + k]).sum();
            (0..128).map(|i| dot(i / 8, i % 8)).collect()
        }
        _ => panic!("{name}?"),
    };
    let bad = (0..want.len()).find(|i| y[*i] != want[*i])?;
    Some(format!("y[{bad}] is {}, wanted {}", y[bad], want[bad]))
}

const FAULTS: [(&str, Variant, &str); 9] = [
    ("missing_barrier", Variant::Thread, "data race"),
    ("off_by_one", Variant::Address, "use-after-poison"),
    ("wrong_lane", Variant::Plain, "y[0] is "),
    ("missing_wait", Variant::Plain, "y[0] is NaN"),
    ("divergent_barrier", Variant::Plain, "divergent barrier"),
    ("global_race", Variant::Thread, "data race"),
    ("unwritten_output", Variant::Plain, "y[63] is NaN"),
    ("misaligned_packet", Variant::Plain, "misaligned packet at "),
    ("wrong_fragment", Variant::Plain, "y["),
];

#[test]
fn without_its_mistake_every_kernel_is_clean() {
    sim::check(|sim| {
        for (name, _, _) in FAULTS {
            assert_eq!(fault(sim, name, false), None, "{name} {:?}", sim.variant);
        }
    });
}

#[test]
fn every_seeded_mistake_is_found() {
    for (name, variant, says) in FAULTS {
        let Some(sim) = Sim::build(variant) else { return };
        let text = if variant == Variant::Plain {
            fault(&sim, name, true).unwrap_or_default()
        } else {
            let (ok, text) = sim.child(&format!("device::cuda::seeded_{name}"));
            assert!(!ok, "{name} passed under {variant:?}:\n{text}");
            // A report of a sanitizer names the line.
            assert!(text.contains("faults.cu:"), "{name}:\n{text}");
            text
        };
        assert!(text.contains(says), "{name}, wanted \"{says}\":\n{text}");
    }
}

/// The sanitizers end the process at what they find, so these run in one of their own.
fn seeded(name: &str) {
    if let Some(sim) = Sim::of_child() {
        fault(&sim, name, true);
    }
}

#[test]
#[ignore = "run by every_seeded_mistake_is_found"]
fn seeded_missing_barrier() {
    seeded("missing_barrier");
}

#[test]
#[ignore = "run by every_seeded_mistake_is_found"]
fn seeded_off_by_one() {
    seeded("off_by_one");
}

#[test]
#[ignore = "run by every_seeded_mistake_is_found"]
fn seeded_global_race() {
    seeded("global_race");
}

/// A device of the plain simulator, in the natural order.
fn device() -> Option<Device> {
    Some(Sim::build(Variant::Plain)?.device(Order::default()))
}

/// Adds sums of `cols` columns to 64 numbers of an arena.
fn add_to_64(dev: &Device, cols: usize) -> Result<()> {
    let Device::Cuda(cuda) = dev else { panic!("{dev:?}") };
    let mut arena = Arena::new(dev, 1 << 12)?;
    let scope = arena.scope();
    let mut y: Buffer<'_, f32> = scope.alloc("y", 64)?;
    dev.write(y.view_mut(), &[1.0; 64])?;
    let x = Buffer::of(dev, "x", &vec![2.0f32; cols])?;
    let launch = Launch::row(cols.div_ceil(32), kernel::THREADS * 4)?;
    kernel::add_partials(cuda, launch, y.view_mut(), x.view(), 1, cols)?;
    assert_eq!(dev.read(y.view())?, [3.0; 64]);
    Ok(())
}

#[test]
fn the_arena_works_on_device_memory() {
    let Some(dev) = device() else { return };
    add_to_64(&dev, 64).unwrap();
}

#[test]
#[cfg(debug_assertions)]
fn a_kernel_that_writes_past_a_buffer_of_the_arena_is_caught() {
    let Some(dev) = device() else { return };
    let caught = catch_unwind(AssertUnwindSafe(|| add_to_64(&dev, 65))).unwrap_err();
    let text = caught.downcast_ref::<&str>().unwrap();
    assert_eq!(*text, "a buffer was written past its end");
    // Where kernels can be watched, it is caught in the act.
    let sim = Sim::build(Variant::Address).unwrap();
    let (ok, text) = sim.child("device::cuda::writes_past_a_buffer");
    assert!(!ok && text.contains("use-after-poison"), "{text}");
    assert!(text.contains("partials.cuh:"), "{text}");
}

#[test]
#[ignore = "run by a_kernel_that_writes_past_a_buffer_of_the_arena_is_caught"]
fn writes_past_a_buffer() {
    if let Some(sim) = Sim::of_child() {
        add_to_64(&sim.device(Order::default()), 65).unwrap();
    }
}

#[test]
fn buffers_hold_what_they_were_given() {
    let Some(dev) = device() else { return };
    let x = [1.5f32, -2.0, 4.25, 8.0];
    let mut y = Buffer::of(&dev, "y", &x).unwrap();
    assert_eq!(dev.read(y.view()).unwrap(), x);
    assert_eq!(dev.read(y.view().range(1..3)).unwrap(), x[1..3]);
    let (low, high) = y.view_mut().split_at(1);
    dev.write(low, &[7.0]).unwrap();
    dev.write(high.range(1..3), &[8.0, 9.0]).unwrap();
    assert_eq!(dev.read(y.view()).unwrap(), [7.0, -2.0, 8.0, 9.0]);
    assert_eq!(dev.read(Buffer::<u64>::zeros(&dev, "z", 3).unwrap().view()).unwrap(), [0; 3]);
    assert!(dev.read(Buffer::<u8>::new(&dev, "none", 0).unwrap().view()).unwrap().is_empty());
    assert_eq!(refusal(dev.write(y.view_mut(), &[1.0])), "write: `to` has shape [4], wanted [1]");
    if cfg!(debug_assertions) {
        let fresh = Buffer::<f32>::new(&dev, "fresh", 9).unwrap();
        assert!(dev.read(fresh.view()).unwrap().iter().all(|x| x.is_nan()));
    }
}

#[test]
#[should_panic(expected = "device memory has no host slice")]
fn device_memory_is_not_read_as_the_hosts() {
    let Some(dev) = device() else {
        panic!("device memory has no host slice, nor is there a device")
    };
    let _ = Buffer::<f32>::zeros(&dev, "x", 3).unwrap().host();
}

#[test]
fn a_launch_refuses_what_its_kernel_cannot_take() {
    let Some(dev) = device() else { return };
    let Device::Cuda(cuda) = &dev else { panic!("{dev:?}") };
    let mut y = Buffer::<f32>::zeros(&dev, "y", 64).unwrap();
    let mut rstd = Buffer::<f32>::zeros(&dev, "rstd", 2).unwrap();
    let w = Buffer::<f32>::zeros(&dev, "w", 32).unwrap();
    let own = vec![0.0f32; 64];
    let x = Buffer::<f32>::zeros(&dev, "x", 65).unwrap();
    let launch = Launch::row(1, 64).unwrap();
    let mut refused = |x: View<'_, f32>, rows| {
        let (y, rstd) = (y.view_mut(), rstd.view_mut());
        refusal(kernel::forward(cuda, launch, y, rstd, x, w.view(), rows, 32, 0.0, 32))
    };
    let is = |text: &str, reason: &str| {
        let start = "device `cuda` is not available: rms_norm_forward_f32: ";
        assert!(text.starts_with(&format!("{start}{reason}")), "{text}");
    };
    is(&refused((&own).into(), 2), "`x` is in host memory, wanted device memory");
    is(&refused(x.view().range(1..65), 2), "`x` begins at 0x");
    is(&refused(x.view().range(0..64), 1 << 31), "`rows` is 2147483648, wanted at most 2147483647");
    let f64s = Buffer::<f64>::zeros(&dev, "y", 64).unwrap();
    let (mut y, mut rstd) = (vec![0.0; 64], vec![0.0; 2]);
    let (y, rstd) = ((&mut y).into(), (&mut rstd).into());
    let x = f64s.view();
    let w = x.range(0..32);
    is_f64(&refusal(kernel::forward(cuda, launch, y, rstd, x, w, 2, 32, 0.0, 32)));
}

fn is_f64(text: &str) {
    let want = "device `cuda` is not available: `rms_norm_forward` has no kernel for F64";
    assert_eq!(text, want);
}

#[test]
fn an_op_without_a_kernel_says_so() {
    let Some(dev) = device() else { return };
    let e = refusal(matmul::Packed::<f32>::new(&dev, 1, 1).and_then(|mut p| {
        let w = Buffer::zeros(&dev, "w", 1)?;
        p.pack(&dev, w.view())
    }));
    let want = "device `cuda` is not available: `matmul::pack` has no CUDA kernel yet";
    assert_eq!(e, want);
}

#[test]
fn without_a_driver_the_name_says_what_is_missing() {
    // On a machine with a GPU there is nothing to refuse.
    if Cuda::new(0).is_ok() {
        return;
    }
    for name in ["cuda", "cuda:0", "cuda:7"] {
        let e = refusal(Device::from_name(name, 0));
        assert!(e.starts_with("device `cuda` is not available: "), "{e}");
    }
    assert!(Device::from_name("auto", 1).unwrap().describe().starts_with("cpu"));
    for name in ["cuda:", "cuda:x", "cuda:-1", "gpu"] {
        let e = refusal(Device::from_name(name, 0));
        assert!(e.ends_with("known devices are auto, cpu, cuda and cuda:N"), "{e}");
    }
    assert_eq!(Cuda::survey().len(), 1, "{:?}", Cuda::survey());
}
