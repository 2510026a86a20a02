//! The CUDA device on the simulator: seeded mistakes are found by the tool that should find them,
//! and what reaches a launch is checked.

use std::panic::{AssertUnwindSafe, catch_unwind};

use half::bf16;
use warpo::{
    Result,
    device::{
        Arch, Arena, Buffer, Cuda, Device, Float, Pending, View, ViewMut,
        cuda::{
            Launch, Map, Order, PARTS, Parts, Swizzle, Tiles, kernels::norm as kernel, outdated,
        },
    },
};

use crate::support::{
    raw::{Arg, Kernel},
    refusal,
    sim::{self, Sim, Variant, scan},
};

/// A kernel of `faults.cu`, and who must speak up about its mistake.
struct Fault {
    name: &'static str,
    threads: u32,
    /// Bytes of shared memory, as many as it needs.
    shared: usize,
    variant: Variant,
    says: &'static str,
}

const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/faults.fatbin"));

impl Fault {
    /// Runs it with its mistake or without: what is wrong with its output, or why it was stopped.
    fn run(&self, sim: &Sim, seeded: bool) -> Option<String> {
        let (n, name) = (256, format!("fault_{}", self.name));
        // Whole numbers, so that every sum is exact; a few more, for packets that begin too late.
        let x: Vec<f32> = (0..n + 4).map(|i| (i * i % 17) as f32 - 5.0).collect();
        let half: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
        let (x_, half): (&[u8], &[u8]) = (bytemuck::cast_slice(&x), bytemuck::cast_slice(&half));
        let (turns, apart) = (self.name.ends_with("turn"), self.name == "turn_apart");
        let together = turns || apart && !seeded;
        let seeded = Arg::Int(i32::from(seeded));
        let args = match self.name {
            "wrong_fragment" => &[Arg::Bytes(half), Arg::Bytes(half), seeded][..],
            _ if turns || apart => &[Arg::Bytes(x_), Arg::Bytes(&[0; 4]), seeded],
            _ => &[Arg::Bytes(x_), seeded],
        };
        let kernel = Kernel {
            image: IMAGE,
            name: &name,
            threads: self.threads,
            blocks: match self.name {
                "global_race" => 2,
                _ if turns || apart => 3,
                _ => 1,
            },
            together,
            shared: self.shared,
            order: Order::default(),
        };
        let want = self.want(&x);
        let mut y = vec![0.0f32; want.len()];
        let out = bytemuck::cast_slice_mut(&mut y);
        if let Err(stopped) = kernel.run(sim, out, args) {
            return Some(stopped);
        }
        let bad = (0..want.len()).find(|i| y[*i] != want[*i])?;
        Some(format!("y[{bad}] is {}, wanted {}", y[bad], want[bad]))
    }

    fn want(&self, x: &[f32]) -> Vec<f32> {
        let sum = |x: &[f32]| x.iter().sum::<f32>();
        match self.name {
            "missing_barrier" => x[..256].iter().rev().copied().collect(),
            "wrong_lane" => vec![sum(&x[..32]); 32],
            "missing_wait" | "misaligned_packet" => x[..128].to_vec(),
            "off_by_one" | "divergent_barrier" | "unwritten_output" => x[..64].to_vec(),
            "global_race" => vec![sum(&x[..64]), sum(&x[64..128])],
            "wrong_fragment" => {
                let dot = |i: usize, j: usize| (0..16).map(|k| x[i * 16 + k] * x[j * 16 + k]).sum();
                (0..128).map(|i| dot(i / 8, i % 8)).collect()
            }
            "missing_turn" | "early_turn" | "lost_turn" | "turn_apart" => {
                (0..64).map(|i| 4.0 * x[i] + 2.0 * x[64 + i] + x[128 + i]).collect()
            }
            name => panic!("{name}?"),
        }
    }
}

const fn fault(
    name: &'static str,
    threads: u32,
    shared: usize,
    variant: Variant,
    says: &'static str,
) -> Fault {
    Fault { name, threads, shared, variant, says }
}

const FAULTS: [Fault; 13] = [
    fault("missing_barrier", 256, 1024, Variant::Thread, "data race"),
    fault("off_by_one", 64, 256, Variant::Address, "use-after-poison"),
    fault("wrong_lane", 32, 0, Variant::Plain, "y[0] is "),
    fault("missing_wait", 32, 512, Variant::Plain, "y[0] is NaN"),
    fault("divergent_barrier", 64, 0, Variant::Plain, "divergent barrier"),
    fault("global_race", 64, 8, Variant::Thread, "data race"),
    fault("unwritten_output", 64, 0, Variant::Plain, "y[63] is NaN"),
    fault("misaligned_packet", 32, 0, Variant::Plain, "misaligned packet at "),
    fault("wrong_fragment", 32, 0, Variant::Plain, "y["),
    fault("missing_turn", 64, 0, Variant::Thread, "data race"),
    fault("early_turn", 64, 0, Variant::Thread, "data race"),
    fault("lost_turn", 64, 0, Variant::Plain, "2 threads wait for a turn at "),
    fault("turn_apart", 64, 0, Variant::Plain, "in a launch whose blocks do not run together at "),
];

#[test]
fn without_its_mistake_every_kernel_is_clean() {
    sim::check(|sim| {
        for f in &FAULTS {
            assert_eq!(f.run(sim, false), None, "{} {:?}", f.name, sim.variant);
        }
    });
}

#[test]
fn every_seeded_mistake_is_found() {
    for f in &FAULTS {
        let (name, says) = (f.name, f.says);
        let Some(sim) = Sim::build(f.variant) else { continue };
        let text = if f.variant == Variant::Plain {
            f.run(&sim, true).unwrap_or_default()
        } else {
            let (ok, text) = sim.child_with("device::cuda::seeded_mistake", &[(FAULT, name)]);
            assert!(!ok, "{name} passed under {:?}:\n{text}", f.variant);
            // A report of a sanitizer names the line.
            assert!(text.contains("faults.cu:"), "{name}:\n{text}");
            text
        };
        assert!(text.contains(says), "{name}, wanted \"{says}\":\n{text}");
    }
}

/// Names the one to run.
const FAULT: &str = "WARPO_FAULT";

/// In a process of its own, which a sanitizer ends at what it finds; on a GPU compute-sanitizer
/// must find it.
#[test]
#[ignore = "run by every_seeded_mistake_is_found and by .ci/gpu"]
fn seeded_mistake() {
    let Ok(name) = std::env::var(FAULT) else { return };
    let (name, seeded) = name.strip_prefix("no_").map_or((&name[..], true), |n| (n, false));
    let fault = FAULTS.iter().find(|f| f.name == name).unwrap();
    let sim = Sim::of_gpu().or_else(Sim::of_child).unwrap();
    println!("{name}: {:?}", fault.run(&sim, seeded));
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
    kernel::AddPartials { dw: y.view_mut(), db: None, partial: x.view(), count: 1, cols }
        .launch(cuda, launch)?;
    assert_eq!(dev.read(y.view())?, [3.0; 64]);
    Ok(())
}

#[test]
fn the_arena_works_on_device_memory() {
    let Some(dev) = device() else { return };
    add_to_64(&dev, 64).unwrap();
}

#[test]
#[cfg_attr(not(debug_assertions), ignore = "buffers have no fences there")]
fn a_kernel_that_writes_past_a_buffer_of_the_arena_is_caught() {
    let Some(dev) = device() else { return };
    let caught = catch_unwind(AssertUnwindSafe(|| add_to_64(&dev, 65))).unwrap_err();
    let text = caught.downcast_ref::<&str>().unwrap();
    assert_eq!(*text, "a buffer was written past its end");
    // AddressSanitizer catches it in the act.
    let Some(sim) = Sim::build(Variant::Address) else { return };
    let (ok, text) = sim.child("device::cuda::writes_past_a_buffer");
    assert!(!ok && text.contains("use-after-poison"), "{text}");
    assert!(text.contains("norm.cu:"), "{text}");
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
    let mut z = Buffer::<f32>::new(&dev, "z", 3).unwrap();
    dev.copy(z.view_mut(), y.view().range(1..4)).unwrap();
    assert_eq!(dev.read(z.view()).unwrap(), [-2.0, 8.0, 9.0]);
    let e = refusal(dev.copy(z.view_mut(), y.view()));
    assert_eq!(e, "copy: `to` has shape [3], wanted [4]");
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

/// The RMSNorm of rows of 32 elements.
fn norm_of_32<'a, F: Float>(
    y: ViewMut<'a, F>,
    rstd: ViewMut<'a, F>,
    x: View<'a, F>,
    w: View<'a, F>,
    rows: usize,
) -> kernel::Forward<'a, F> {
    kernel::Forward {
        y,
        mean: None,
        rstd,
        x,
        w,
        b: None,
        rows,
        cols: 32,
        unpadded: 32,
        heads: 1,
        x_stride: 32,
        y_stride: 32,
        one_plus: 0,
        eps: F::ZERO,
        group: 32,
    }
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
        refusal(norm_of_32(y, rstd, x, w.view(), rows).launch(cuda, 0, launch))
    };
    let is = |text: &str, reason: &str| {
        let start = "device `cuda` is not available: norm_forward_0_f32: ";
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
    is_f64(&refusal(norm_of_32(y, rstd, x, w, 2).launch(cuda, 0, launch)));
}

#[test]
fn a_launch_refuses_more_threads_than_kernels_count() {
    let most = i32::MAX as usize;
    assert_eq!(Launch::threads(most, 256).unwrap().blocks, [1 << 23, 1, 1]);
    assert_eq!(Launch::packets::<bf16>(8 * 256 + 1, 256).unwrap().blocks, [2, 1, 1]);
    let want = "launch: threads: got 2147483648, wanted at most 2147483647";
    assert_eq!(refusal(Launch::threads(most + 1, 256)), want);
    assert_eq!(refusal(Launch::packets::<f32>(4 * (most + 1), 256)), want);
}

#[test]
fn blocks_that_run_together_fit_the_device() {
    let Some(dev) = device() else { return };
    let Device::Cuda(cuda) = &dev else { panic!("{dev:?}") };
    let mut y = Buffer::<f32>::zeros(&dev, "y", 128).unwrap();
    let x = Buffer::<f32>::zeros(&dev, "x", 128).unwrap();
    let mut launch = |blocks, cols| {
        let launch = Launch::row(blocks, kernel::THREADS * 4).unwrap().together();
        kernel::AddPartials { dw: y.view_mut(), db: None, partial: x.view(), count: 1, cols }
            .launch(cuda, launch)
    };
    launch(3, 96).unwrap();
    let is = "device `cuda` is not available: norm_add_partials: 4 blocks that run together, \
              wanted at most 3";
    assert_eq!(refusal(launch(4, 128)), is);
}

#[test]
fn entries_of_hopper_have_clusters_and_tensor_maps() {
    let text = "constexpr int THREADS = 384;\n\nKERNEL(THREADS, x_sm90_forward, 2)(TENSOR_MAP a, \
                OPTIONAL const float* bias) {\n\nKERNEL(64, x_sm90_add, 1, 2)(int n) {\n";
    let [a, b] = &scan::entries(text).unwrap()[..] else { panic!("two") };
    assert_eq!((&a.name[..], a.threads, a.cluster, a.beside), ("x_sm90_forward", 384, 2, 1));
    assert_eq!((&a.params[0].c[..], &a.params[0].name[..]), ("TENSOR_MAP", "a"));
    assert_eq!((&b.name[..], b.threads, b.cluster, b.beside), ("x_sm90_add", 64, 1, 2));
    assert!(scan::sm90("x_sm90") && !scan::sm90("x"));
}

#[test]
fn instances_come_from_a_list() {
    let text = "constexpr int FEW = 64;\n#define EACH_TILE(X) X(16x8, FEW) X(32x8, 128)\n\
                #define RUN(TILE, COUNT) \\\n    KERNEL(COUNT <= 64 ? 32 : COUNT, \
                x_run_##TILE##_bf16, 1, 0)(bf16* y) { run<T##TILE>(y); }\nEACH_TILE(RUN)\n";
    let [a, b] = &scan::entries(text).unwrap()[..] else { panic!("two") };
    assert_eq!((&a.name[..], a.threads, a.beside), ("x_run_16x8_bf16", 32, 1));
    assert_eq!((b.family(), b.threads), (("x_run", vec![32, 8]), 128));
    let e = scan::entries("#define RUN(A, B) KERNEL(B, x)()\n#define EACH_A(X) X(1)\nEACH_A(RUN)");
    assert!(e.unwrap_err().starts_with("EACH_A: "));
}

#[test]
fn the_simulator_plays_two_machines() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let hopper = |dev: Device| {
        let Device::Cuda(cuda) = dev else { panic!("{dev:?}") };
        cuda.arch() == Arch::Sm90
    };
    assert!(!hopper(sim.device(Order::default())));
    assert!(hopper(sim.device_as(Order::default(), Arch::Sm90)));
    assert!(hopper(sim.hopper().device(Order::default())));
}

#[test]
fn a_tensor_map_is_what_the_simulator_reads() {
    let Some(dev) = device() else { return };
    let Device::Cuda(cuda) = &dev else { panic!("{dev:?}") };
    let x = Buffer::<bf16>::zeros(&dev, "x", 9 * 72 + 64).unwrap();
    let tiles = Tiles::of_matrix([10, 64], 72, [128, 32], Swizzle::Bytes64);
    let map = cuda.map(x.view(), tiles).unwrap();
    let (long, short): (&[u64], &[u32]) =
        (bytemuck::cast_slice(map.bytes()), bytemuck::cast_slice(map.bytes()));
    assert_eq!(long[0], x.view().address() as u64);
    assert_eq!(short[2..4], [2, 2], "bytes of an element, dimensions");
    assert_eq!(long[2..6], [64, 10, 1, 1], "sizes");
    assert_eq!(long[6..10], [2, 144, 0, 0], "strides");
    assert_eq!(short[20..25], [32, 128, 1, 1, 64], "box, swizzle");
    assert_eq!(short[25..], [0; 7]);
    let mut y = Buffer::<f32>::zeros(&dev, "y", 4 * 4 * 4 * 4).unwrap();
    let tiles =
        Tiles { dims: [4; 4], strides: [1, 4, 16, 64], tile: [4, 2, 1, 3], swizzle: Swizzle::None };
    let map = cuda.map_mut(y.view_mut(), tiles).unwrap();
    let short: &[u32] = bytemuck::cast_slice(map.bytes());
    assert_eq!((&short[2..4], &short[20..25]), (&[4, 4][..], &[4, 2, 1, 3, 0][..]));
}

#[test]
fn a_tensor_map_names_what_is_wrong() {
    let Some(dev) = device() else { return };
    let Device::Cuda(cuda) = &dev else { panic!("{dev:?}") };
    let x = Buffer::<bf16>::zeros(&dev, "x", 10 * 72).unwrap();
    let good = Tiles::of_matrix([10, 64], 72, [8, 64], Swizzle::Bytes128);
    let map = |from: usize, tiles| cuda.map(x.view().range(from..720), tiles);
    let refused = |from, tiles| refusal(map(from, tiles)).replace("tensor map: ", "");
    assert!(map(0, good).is_ok() && map(8, good).is_ok());
    assert!(refused(4, good).starts_with("address of the view: got "));
    let short = "elements of the view: got 704, wanted 712 or more";
    assert_eq!(refused(16, good), short);
    let strides = |strides| refused(0, Tiles { strides, ..good });
    let odd = "bytes between neighbours of dimension 1: got 140, wanted a multiple of 16, \
               below 1099511627776";
    assert_eq!(strides([1, 70]), odd);
    assert_eq!(strides([2, 72]), "stride of dimension 0: got 2, wanted 1");
    let tile = |tile| refused(0, Tiles { tile, ..good });
    assert_eq!(tile([64, 257]), "box of dimension 1: got 257, wanted 1 to 256 elements");
    assert_eq!(tile([64, 0]), "box of dimension 1: got 0, wanted 1 to 256 elements");
    assert_eq!(tile([4, 8]), "bytes of a box's row: got 8, wanted a multiple of 16");
    let wide = "bytes of a box's row: got 256, wanted at most 128 with this swizzle";
    assert_eq!(tile([128, 8]), wide);
    assert!(map(0, Tiles { tile: [128, 8], swizzle: Swizzle::None, ..good }).is_ok());
    let none = "size of dimension 1: got 0, wanted 1 to 4294967296";
    assert_eq!(refused(0, Tiles { dims: [64, 0], ..good }), none);
    let host = vec![bf16::ZERO; 720];
    let e = refusal::<Map<'_>>(cuda.map((&host).into(), good));
    assert_eq!(e, "device `cuda` is not available: a buffer is in host memory");
    let f64s = Buffer::<f64>::zeros(&dev, "x", 720).unwrap();
    let e = refusal::<Map<'_>>(cuda.map(f64s.view(), good));
    assert_eq!(e, "device `cuda` is not available: there is no tensor map of F64");
}

fn is_f64(text: &str) {
    let want = "device `cuda` is not available: `norm_forward` has no kernel for F64";
    assert_eq!(text, want);
}

#[test]
fn a_column_has_a_few_parts_of_whole_tiles() {
    assert_eq!(Parts::of(0).count, 0);
    for (tokens, count, share) in [
        (1, 1, 1024),
        (1024, 1, 1024),
        (1025, 2, 1024),
        (PARTS * 1024, PARTS, 1024),
        (PARTS * 1024 + 1, 129, 2048),
        (PARTS * 2048, PARTS, 2048),
        (PARTS * 2048 + 1, 171, 3072),
    ] {
        assert_eq!(Parts::of(tokens), Parts { count, share }, "{tokens}");
    }
}

#[test]
fn a_reduction_starts_from_nan_and_has_few_parts() {
    let Some(dev) = device() else { return };
    let Device::Cuda(cuda) = &dev else { panic!("{dev:?}") };
    for _ in 0..2 {
        let [a, b] = cuda
            .reduce::<f64, 2>(PARTS, |total, partial| {
                assert!(dev.read(partial.view())?.iter().all(|x| x.is_nan()));
                assert_eq!(partial.len(), 2 * PARTS);
                dev.write(total.range(0..1), &[5.0])
            })
            .and_then(Pending::get)
            .unwrap();
        assert!(a == 5.0 && b.is_nan());
    }
    let e = refusal(cuda.reduce::<f64, 2>(PARTS + 1, |_, _| Ok(())));
    assert_eq!(e, "device `cuda` is not available: a reduction of 257 parts, wanted at most 256");
}

#[test]
fn an_op_without_a_kernel_says_so() {
    let Some(dev) = device() else { return };
    let e = refusal(dev.on_cpu("an op").map(|_| ()));
    assert_eq!(e, "device `cuda` is not available: `an op` has no CUDA kernel yet");
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
        assert!(
            e.ends_with("known devices are auto, cpu, cuda, cuda:N, sim and sim:hopper"),
            "{e}"
        );
    }
    assert_eq!(Cuda::survey().len(), 1, "{:?}", Cuda::survey());
}

#[test]
fn an_old_driver_is_told_the_way_out() {
    assert_eq!(outdated(13_000, 13_000), None);
    assert_eq!(outdated(13_010, 12_080), None);
    let is = |version, built, text: &str| assert_eq!(outdated(version, built).unwrap(), text);
    is(
        12_080,
        13_000,
        "the driver is for CUDA 12.8, this binary's kernels need one for 13.0: update the driver, \
         or build again with nvcc 12.8 or older, from 12.0 on: NVCC=/path/to/nvcc cargo build \
         --release",
    );
    let old = "the driver is for CUDA 11.8, this binary's kernels need one for 12.0: update the \
               driver";
    is(11_080, 0, old);
}
