//! The profile: what is inside of what, shares that add up, the trace file, and that every op takes
//! part.

use std::{path::Path, process::Command, time::Duration};

use half::bf16;
use serde_json::Value;
use warpo::{
    device::{
        Buffer, Device, Profile, Work,
        cuda::Order,
        profile::{OpRow, Peaks, Report},
    },
    ops::{
        attention::{self, KvLayer, PAGE, Segment, Shape},
        matmul::{self, Packed},
        norm::{self, Norm, NormGrads, NormKept, NormOut, NormSpec},
        residual,
    },
};

use crate::{
    house::all,
    support::{
        randn, refusal, room,
        sim::{self, Sim, Variant},
        temp_dir,
    },
};

fn op<'a>(report: &'a Report, name: &str) -> &'a OpRow {
    report.ops.iter().find(|o| o.name == name).unwrap_or_else(|| panic!("{name} in\n{report}"))
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// The events of the trace, and the names of its tracks.
fn trace(profile: &Profile, name: &str) -> (Vec<Value>, Vec<String>) {
    let path = temp_dir(name).join("trace.json");
    profile.write_chrome(&path).unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(all["otherData"]["dropped"], 0);
    let events = all["traceEvents"].as_array().unwrap();
    let of = |ph: &str| events.iter().filter(|e| e["ph"] == ph).cloned().collect::<Vec<_>>();
    let name = |e: &Value| e["args"]["name"].as_str().unwrap().to_owned();
    (of("X"), of("M").iter().map(name).collect())
}

/// Start and end in nanoseconds.
fn times(e: &Value) -> (u64, u64) {
    let ns = |key: &str| (e[key].as_f64().unwrap() * 1e3).round() as u64;
    (ns("ts"), ns("ts") + ns("dur"))
}

/// Each event of a track is apart from the one before it, or inside of it.
fn assert_nested(events: &[Value]) {
    for track in events.iter().map(|e| &e["tid"]).collect::<std::collections::HashSet<_>>() {
        let mut open: Vec<(u64, u64)> = Vec::new();
        for e in events.iter().filter(|e| e["tid"] == *track) {
            let (start, end) = times(e);
            open.retain(|outer| outer.1 > start);
            assert!(open.iter().all(|o| o.0 <= start && end <= o.1), "{e} crosses {open:?}");
            open.push((start, end));
        }
    }
}

/// A handle that is empty, and nothing is computed for it.
#[test]
fn without_a_profile_an_op_costs_a_branch() {
    let span = Device::cpu().op("op", || panic!("nobody asked"));
    assert_eq!(size_of_val(&span), size_of::<usize>());
    drop(span);
    drop(Device::cpu().span("phase"));
}

#[test]
fn of_ops_inside_of_each_other_each_has_its_own() {
    let (dev, profile) = Device::cpu().profiled();
    let work = |flops, bytes| Work { flops, bytes };
    for _ in 0..2 {
        let _rollout = dev.span("rollout");
        pause(10);
        let _outer = dev.op("outer", || work(50.0, 7.0));
        pause(20);
        {
            let _inner = dev.op("inner", || work(20.0, 10.0));
            pause(40);
        }
    }
    let report = profile.report().unwrap();
    let (outer, inner) = (op(&report, "outer"), op(&report, "inner"));
    assert_eq!((outer.calls, inner.calls), (2, 2));
    // What is inside of an op is not counted twice, and no work is less than none.
    assert_eq!((outer.work, inner.work), (work(60.0, 0.0), work(40.0, 20.0)));
    assert!(inner.seconds >= 0.08 && outer.seconds >= 0.04, "{report}");
    assert!(report.busy() < report.seconds && report.seconds >= 0.14);
    let outer_alone = report.busy() - inner.seconds;
    assert!((outer_alone - outer.seconds).abs() < 1e-9, "{report}");
    let phase = &report.phases[0];
    assert_eq!((phase.name, phase.calls), ("rollout", 2));
    assert!((phase.busy - report.busy()).abs() < 1e-9, "{report}");
    assert!(phase.seconds - phase.busy >= 0.02, "{report}");

    let (events, tracks) = trace(&profile, "profile-nested");
    assert_nested(&events);
    assert_eq!(tracks, ["host thread 1"]);
    let names: Vec<&str> = events.iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["rollout", "outer", "inner"].repeat(2));
    assert_eq!(events[1]["args"]["flops"], 50.0);
    assert_eq!([&events[0]["cat"], &events[1]["cat"]], ["phase", "op"]);
}

#[test]
fn phases_inside_of_each_other_share_the_time() {
    let (dev, profile) = Device::cpu().profiled();
    {
        let _step = dev.span("step");
        pause(5);
        let _update = dev.span("update");
        pause(30);
    }
    let report = profile.report().unwrap();
    assert!(report.phases.is_sorted_by(|a, b| a.seconds >= b.seconds), "the longest first");
    assert!(report.phases.iter().map(|p| p.seconds).sum::<f64>() <= report.seconds);
    let phase = |name: &str| report.phases.iter().find(|p| p.name == name).unwrap();
    let (update, step) = (phase("update"), phase("step"));
    assert!(step.seconds >= 0.005 && update.seconds >= 0.03, "{report}");
    assert_eq!(update.whole, update.seconds);
    assert!((step.whole - (step.seconds + update.whole)).abs() < 1e-9, "{report}");
}

#[test]
fn each_thread_has_its_track() {
    let (dev, profile) = Device::cpu().profiled();
    let _main = dev.op("main", Work::default);
    std::thread::scope(|scope| {
        scope.spawn(|| drop(dev.op("other", Work::default)));
    });
    drop(_main);
    let (events, tracks) = trace(&profile, "profile-threads");
    assert_eq!(tracks, ["host thread 1", "host thread 2"]);
    assert_eq!(events.len(), 2);
    assert_ne!(events[0]["tid"], events[1]["tid"]);
}

/// With ops of the house, in text for people, which it prints with `--nocapture`.
#[test]
fn the_report_says_what_ops_did() {
    let (dev, profile) = Device::cpu().profiled();
    let (m, n, k) = (40, 24, 16);
    let x: Vec<f32> = randn("x", m * k);
    let w: Vec<f32> = randn("w", n * k);
    let (mut y, mut packed) = (vec![0.0f32; m * n], Packed::new(&dev, n, k).unwrap());
    packed.pack(&dev, (&w).into()).unwrap();
    matmul::forward(&dev, (&mut y).into(), (&x).into(), &packed, None, None).unwrap();
    let report = profile.report().unwrap();
    let product = op(&report, "matmul");
    let bytes = 4.0 * (m * k + n * k + m * n) as f64;
    assert_eq!(product.work, Work { flops: (2 * m * n * k) as f64, bytes });
    assert!(report.of_peak(product).is_some_and(|part| part > 0.0), "{:?}", report.peaks);
    let text = report.to_string();
    println!("{text}");
    for says in ["cpu, ", "peaks as measured: ", "matmul::pack", "outside of ops"] {
        assert!(text.contains(says), "{says} in\n{text}");
    }
    let percent = |line: &str| {
        let before = line.split('%').next().unwrap().trim();
        before.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    let table = text.split("of peak\n").nth(1).unwrap();
    let sum: f64 = table.lines().map(percent).sum();
    assert!((sum - 100.0).abs() < 0.3, "shares add up to {sum}:\n{text}");
}

#[test]
fn peaks_are_those_of_the_data_sheets() {
    let h100 = Peaks::of("NVIDIA H100 80GB HBM3").unwrap();
    assert_eq!((h100.flops, h100.bytes), (989e12, 3.35e12));
    // Whichever bounds.
    assert_eq!(h100.seconds(&Work { flops: 989e12, bytes: 1.0 }), 1.0);
    assert_eq!(h100.seconds(&Work { flops: 1.0, bytes: 6.7e12 }), 2.0);
    // A part of a GPU is not the GPU.
    for unknown in ["NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090", ""] {
        assert_eq!(Peaks::of(unknown), None, "{unknown}");
    }
}

/// FLOPs of attention are those of the positions that each row sees, one by one.
#[test]
fn attention_counts_what_is_seen() {
    let whole = |at: u32, rows: u32| Segment { first: 0, rows, at, pages: 0..2, prefix: None };
    let behind = Segment { first: 5, rows: 3, at: 20, pages: 0..2, prefix: Some(0) };
    let segments = [whole(0, 5), whole(5, 0), whole(5, 15), behind];
    for window in [None, Some(1), Some(4), Some(99)] {
        let (dev, profile) = Device::cpu().profiled();
        let shape =
            Shape { q_heads: 4, kv_heads: 2, head_dim: 8, scale: 0.3, softcap: None, window };
        let (rows, cols) = (23, shape.qkv_cols());
        let [dout, out] = ["dout", "out"].map(|name| randn::<f32>(name, rows * 32));
        let (qkv, lse) = (randn::<f32>("qkv", rows * cols), vec![9.0; rows * 4]);
        let mut dqkv = vec![0.0; rows * cols];
        let mut scratch = vec![0.0; attention::backward_scratch_len(&shape, rows)];
        let work = attention::SegmentBatch::new(&segments, &[][..]);
        let (dqkv, scratch) = ((&mut dqkv).into(), (&mut scratch).into());
        let (dout, out_, qkv_, lse) = ((&dout).into(), (&out).into(), (&qkv).into(), (&lse).into());
        attention::backward(
            &dev,
            attention::BackwardArgs { dqkv, dout, out: out_, qkv: qkv_, lse, scratch },
            work,
            &shape,
        )
        .unwrap();
        let sees = |p: u32| f64::from(window.map_or(p + 1, |w| w.min(p + 1)));
        let pairs = |s: &Segment| (s.first..s.first + s.rows).map(sees).sum::<f64>();
        let all: f64 = segments.iter().map(pairs).sum();
        let report = profile.report().unwrap();
        let done = op(&report, "attention::backward").work;
        assert_eq!(done.flops, 10.0 * 8.0 * 4.0 * all, "{window:?}");
        assert_eq!(done.bytes, 4.0 * (2 * rows * (32 + cols)) as f64);

        // Rows 20 to 22 of a sequence, in pages that hold anything.
        let late = [Segment { first: 20, rows: 3, at: 0, pages: 0..2, prefix: None }];
        let mut arena = room(1 << 20);
        let scope = arena.scope();
        let kv = KvLayer::<f32>::new(&scope, &shape, PAGE, 2).unwrap();
        let (mut out, mut lse) = (vec![0.0; 3 * 32], vec![0.0; 3 * 4]);
        let (out, lse, qkv) = ((&mut out).into(), (&mut lse).into(), qkv[..3 * cols].into());
        let work = attention::SegmentBatch::new(&late, &[0, 1][..]);
        attention::forward(
            &dev,
            attention::ForwardOutputs { out, lse, scratch: (&mut [][..]).into() },
            qkv,
            &kv,
            work,
            &shape,
        )
        .unwrap();
        let report = profile.report().unwrap();
        let done = op(&report, "attention").work;
        assert_eq!(done.flops, 4.0 * 8.0 * 4.0 * pairs(&late[0]), "{window:?}");
        let seen = 23 - window.map_or(0, |w| 21u32.saturating_sub(w)) as usize;
        assert_eq!(done.bytes, 4.0 * (2 * (3 * 32 + seen * 2 * 8)) as f64, "{window:?}");
    }
}

/// A norm forward and backward and a copy, in a phase: what it computed.
fn norm(dev: &Device) -> Vec<bf16> {
    let of = |name: &str, n: usize| {
        let x: Vec<bf16> = randn::<f32>(name, n).into_iter().map(bf16::from_f32).collect();
        Buffer::of(dev, "test", &x).unwrap()
    };
    let (rows, cols) = (3, 64);
    let (x, w, dy) = (of("x", rows * cols), of("w", cols), of("dy", rows * cols));
    let mut y = Buffer::new(dev, "y", rows * cols).unwrap();
    let mut rstd = Buffer::new(dev, "rstd", rows).unwrap();
    let mut dw = Buffer::zeros(dev, "dw", cols).unwrap();
    let mut scratch =
        Buffer::new(dev, "scratch", norm::scratch_len(Norm::Rms, rows, cols)).unwrap();
    let _phase = dev.span("norms");
    let spec = NormSpec { norm: Norm::Rms, one_plus: false, eps: 1e-5, heads: 1, unpadded: None };
    let mut mean = Buffer::new(dev, "mean", 0).unwrap();
    let (to, means) = (y.view_mut().into(), mean.view_mut());
    let out = NormOut { y: to, mean: means, rstd: rstd.view_mut() };
    norm::forward(dev, spec, out, x.view(), w.view(), None).unwrap();
    let (dx, dw, scratch) = (y.view_mut(), dw.view_mut(), scratch.view_mut());
    let grads = NormGrads { dx, add: true, dw: Some(dw), db: None, scratch };
    let (w, mean, rstd) = (w.view(), mean.view(), rstd.view());
    let kept = NormKept { x: x.view().into(), w, mean, rstd };
    norm::backward(dev, spec, grads, dy.view(), kept).unwrap();
    dev.read(y.view()).unwrap()
}

#[test]
fn kernels_are_named_and_belong_to_their_op() {
    sim::check(|sim| {
        let plain = sim.device(Order::default());
        let (dev, profile) = sim.device(Order::default()).profiled();
        assert_eq!(norm(&dev), norm(&plain), "a profile changes no bit");
        let report = profile.report().unwrap();
        let backward = op(&report, "norm::backward");
        let mut kernels: Vec<&str> = backward.kernels.iter().map(|k| k.name).collect();
        kernels.sort_unstable();
        assert_eq!(kernels, ["norm_add_partials", "norm_backward_0_bf16"]);
        let sum: f64 = backward.kernels.iter().map(|k| k.seconds).sum();
        assert!(sum > 0.0 && (sum - backward.seconds).abs() < 1e-12, "{report}");
        assert_eq!(backward.work.bytes, 2.0 * 4.0 * 3.0 * 64.0);
        let outside = op(&report, "");
        assert!(outside.kernels.iter().any(|k| k.name == "copy to the device"), "{report}");
        let phase = &report.phases[0];
        assert!(phase.name == "norms" && phase.busy > 0.0, "{report}");
        assert!(report.busy() <= report.seconds, "{report}");
        assert!(report.to_string().contains("no kernel runs"), "{report}");
        println!("{report}");

        let (events, tracks) = trace(&profile, &format!("profile-sim-{:?}", sim.variant));
        assert_nested(&events);
        assert_eq!(tracks, [dev.describe(), "host thread 1".into()]);
        let on_device: Vec<(&str, &str)> = events
            .iter()
            .filter(|e| e["tid"] == 0)
            .map(|e| (e["cat"].as_str().unwrap(), e["name"].as_str().unwrap()))
            .skip_while(|(_, name)| *name != "norms")
            .collect();
        let want = [
            ("phase", "norms"),
            ("op", "norm"),
            ("kernel", "norm_forward_0_bf16"),
            ("op", "norm::backward"),
            ("kernel", "norm_backward_0_bf16"),
            ("kernel", "norm_add_partials"),
            ("kernel", "copy from the device"),
        ];
        assert_eq!(on_device, want);
    });
}

/// More kernels than are kept at once; none is lost, and a phase goes on over batches, even one
/// that is not over.
#[test]
fn batches_of_kernels_are_one_profile() {
    let Some(sim) = Sim::of_gpu().or_else(|| Sim::build(Variant::Plain)) else { return };
    let (dev, profile) = sim.device(Order::default()).profiled();
    let x = Buffer::of(&dev, "x", &[1.0f32; 8]).unwrap();
    let mut y = Buffer::zeros(&dev, "y", 8).unwrap();
    let n = 9000;
    {
        let _long = dev.span("long");
        for _ in 0..n {
            residual::add(&dev, y.view_mut(), x.view()).unwrap();
        }
    }
    let _open = dev.op("open", Work::default);
    residual::add(&dev, y.view_mut(), x.view()).unwrap();
    let report = profile.report().unwrap();
    let adds = op(&report, "residual");
    assert_eq!((adds.calls, adds.kernels[0].calls), (n + 1, n + 1));
    assert_eq!(adds.work.bytes, (n + 1) as f64 * 96.0);
    assert!(report.phases[0].busy > 0.0);
    let (events, _) = trace(&profile, "profile-batches");
    assert_nested(&events);
    let on_device = |cat: &str| {
        let of = |e: &&Value| e["tid"] == 0 && e["cat"] == cat;
        events.iter().filter(of).collect::<Vec<_>>()
    };
    let kernels = on_device("kernel").into_iter().filter(|e| e["name"] == "residual_add_f32");
    let kernels: Vec<&Value> = kernels.collect();
    assert_eq!(kernels.len() as u64, n + 1);
    let phase = on_device("phase");
    assert_eq!(phase.len(), 1);
    assert_eq!(times(phase[0]), (times(kernels[0]).0, times(kernels[n as usize - 1]).1));
    // What is read once more is not there twice.
    assert_eq!(profile.report().unwrap().ops, report.ops);
}

/// What a device refuses leaves no half of an event behind.
#[test]
fn a_launch_that_fails_is_no_event() {
    let Some(sim) = Sim::build(Variant::Plain) else { return };
    let (dev, profile) = sim.device(Order::default()).profiled();
    let Device::Cuda(cuda) = &dev else { panic!("{dev:?}") };
    let refused = warpo::Error::value("a launch", "one that works", "another");
    let e = cuda.launches("bad", || Err::<(), _>(refused));
    assert_eq!(refusal(e), "a launch: got another, wanted one that works");
    assert_eq!(cuda.launches("good", || Ok(7)).unwrap(), 7);
    let kernels = &op(&profile.report().unwrap(), "").kernels.clone();
    assert_eq!(kernels.iter().map(|k| k.name).collect::<Vec<_>>(), ["good"]);
}

#[test]
fn a_trace_that_cannot_be_written_is_refused_by_name() {
    let (_, profile) = Device::cpu().profiled();
    let path = temp_dir("profile-refused").join("no/trace.json");
    let e = refusal(profile.write_chrome(&path));
    assert!(e.starts_with(&format!("cannot create {}: ", path.display())), "{e}");
    if Path::new("/dev/full").exists() {
        let e = refusal(profile.write_chrome(Path::new("/dev/full")));
        assert!(e.starts_with("cannot write /dev/full: "), "{e}");
    }
}

/// A library that prints what NVIDIA's profilers would be told.
const NVTX: &str = r#"
    #include <cstdio>
    extern "C" int nvtxRangePushA(const char* name) { return fprintf(stderr, "<%s>", name); }
    extern "C" int nvtxRangePop() { return fprintf(stderr, "</>"); }
"#;
const CHILD: &str = "WARPO_TEST_NVTX";

#[test]
fn nvidias_profilers_are_told_of_phases_and_ops() {
    if std::env::var_os(CHILD).is_some() {
        let (dev, _profile) = Device::cpu().profiled();
        let _phase = dev.span("rollout");
        drop(dev.op("matmul", Work::default));
        return;
    }
    if Command::new("g++").arg("--version").output().is_err() {
        return;
    }
    let dir = temp_dir("profile-nvtx");
    let (source, library) = (dir.join("nvtx.cpp"), dir.join("libnvToolsExt.so"));
    std::fs::write(&source, NVTX).unwrap();
    let mut build = Command::new("g++");
    build.args(["-shared", "-fPIC", "-o"]).arg(library).arg(source);
    assert!(build.status().unwrap().success());
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["device::profile::nvidias_profilers_are_told_of_phases_and_ops", "--exact"]);
    let done = child.arg("--nocapture").env(CHILD, "1").env("LD_LIBRARY_PATH", &dir).output();
    let text = String::from_utf8(done.unwrap().stderr).unwrap();
    assert!(text.contains("<rollout><matmul></></>"), "{text}");
}

/// Public functions of `src/ops` that take a device and open no span: they report or allocate the
/// memory that a step uses, or a device.
const NO_OPS: [&str; 22] = [
    "attention/mod.rs::forward_scratch_len",
    "attention/mod.rs::page",
    "attention/mod.rs::resident",
    "attention/mod.rs::supported",
    "attention/mod.rs::width",
    "attention/partition.rs::most_words",
    "attention/partition.rs::new",
    "attention/partition.rs::set",
    "delta_rule/mod.rs::forward_scratch_len",
    "delta_rule/mod.rs::supported",
    "matmul/mod.rs::bytes",
    "matmul/mod.rs::new",
    "matmul/mod.rs::rows",
    "matmul/mod.rs::stack",
    "matmul/mod.rs::stack",
    "matmul/mod.rs::width",
    "rope.rs::new",
    "rope.rs::scaling",
    "rope.rs::wide",
    "routing.rs::new",
    "short_conv.rs::scratch_len",
    "short_conv.rs::supported",
];

/// Every op of the house opens a span under a name of its own that begins with that of its file.
#[test]
fn every_op_takes_part() {
    let (mut names, mut spared) = (Vec::new(), Vec::new());
    for (file, text) in all().into_iter().filter(|(file, _)| file.starts_with("ops/")) {
        let file = file.trim_start_matches("ops/");
        let stem = file.split(['/', '.']).next().unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let Some(name) = line.trim_start().strip_prefix("pub fn ") else { continue };
            let name = name.split(['<', '(']).next().unwrap();
            let pad = line.len() - line.trim_start().len();
            let end = format!("{:pad$}}}", "");
            let body: Vec<&str> = lines[i..].iter().copied().take_while(|l| **l != end).collect();
            let head = body.iter().position(|l| l.ends_with('{')).unwrap();
            if !body[..=head].join(" ").contains("dev: &Device") {
                continue;
            }
            let at = format!("{file}::{name}");
            let body = body[head + 1..].join("\n");
            // A loss over tokens opens it in `TokenLoss::run`.
            let begins = ["let _op = dev.op(", "op: "].iter().find_map(|b| body.split_once(b));
            let Some((_, given)) = begins else {
                spared.push(at);
                continue;
            };
            let given = given.split(',').next().unwrap();
            let text = match given {
                "OP" => body.split("const OP: &str = ").nth(1).expect(&at),
                text => text,
            };
            let text = text.split('"').nth(1).expect(&at).to_owned();
            assert!(text == stem || text.starts_with(&format!("{stem}::")), "{at} is {text}");
            names.push(text);
        }
    }
    spared.sort_unstable();
    assert_eq!(spared, NO_OPS, "functions that open no span");
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count, "two ops have one name");
    assert!(count > 30, "{names:?}");
}
