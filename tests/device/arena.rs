//! The arena: a plan that is what a run uses, phases that share memory, buffers that start as NaN
//! and may not be overrun.

use warpo::{
    Result,
    device::{Arena, Buffer, Scope},
};

use crate::support::{refusal, room};

/// The bytes that a buffer takes: whole cache lines, and one more as redzone in debug builds.
fn taken(bytes: usize) -> usize {
    bytes.next_multiple_of(64) + if cfg!(debug_assertions) { 64 } else { 0 }
}

/// A phase with two children, the second larger.
fn phase(scope: &Scope<'_>) -> Result<()> {
    let _x: Buffer<'_, f32> = scope.alloc("x", 100)?;
    {
        let child = scope.child();
        let _a: Buffer<'_, f64> = child.alloc("a", 10)?;
        let grandchild = child.child();
        let _b: Buffer<'_, u8> = grandchild.alloc("b", 1)?;
    }
    {
        let child = scope.child();
        let _c: Buffer<'_, u32> = child.alloc("c", 1000)?;
    }
    let _y: Buffer<'_, f32> = scope.alloc("y", 0)?;
    Ok(())
}

#[test]
fn the_plan_is_what_the_run_uses() {
    let plan = Arena::plan(phase).unwrap();
    assert_eq!(plan, taken(400) + taken(4000));
    let mut arena = room(plan);
    assert_eq!((arena.bytes(), arena.peak()), (plan, 0));
    for _ in 0..3 {
        phase(&arena.scope()).unwrap();
        assert_eq!(arena.peak(), plan);
    }
    // A cache line less is not enough, and the error names what did not fit.
    let e = refusal(phase(&room(plan - 64).scope()));
    let (want, have) = (taken(4000), taken(4000) - 64);
    assert_eq!(e, format!("c needs {want} bytes, {have} are free"));
    assert_eq!(Arena::plan(|_| Ok(())).unwrap(), 0);
    assert_eq!(refusal(Arena::plan(|s| s.alloc::<f32>("huge", usize::MAX / 4).map(drop))), {
        let (want, have) = (usize::MAX, usize::MAX / 2);
        format!("huge needs {want} bytes, {have} are free")
    });
}

#[test]
fn scopes_nest() {
    let mut arena = room(4 * taken(64));
    let scope = arena.scope();
    let mut x: Buffer<'_, u32> = scope.alloc("x", 16).unwrap();
    x.host_mut().fill(7);
    let used = scope.used();
    assert_eq!(used, taken(64));
    let first = {
        let child = scope.child();
        let mut a: Buffer<'_, u32> = child.alloc("a", 16).unwrap();
        a.host_mut().fill(8);
        assert_eq!(child.used(), 2 * taken(64));
        assert!(scope.alloc::<u32>("x2", 1).is_err(), "a parent waits for its child");
        a.host().as_ptr()
    };
    assert_eq!(scope.used(), used, "what the child took is given back");
    let y: Buffer<'_, u32> = scope.alloc("y", 16).unwrap();
    assert_eq!(y.host().as_ptr(), first, "and used again");
    assert_eq!(x.host(), [7; 16], "the parent's own stays");
    drop((x, y));
    drop(scope);
    assert_eq!(arena.peak(), 2 * taken(64));
}

#[test]
fn buffers_are_aligned_and_apart() {
    let mut arena = room(1 << 16);
    let scope = arena.scope();
    let mut buffers: Vec<Buffer<'_, u8>> =
        [1, 63, 64, 65, 0, 127].map(|n| scope.alloc("x", n).unwrap()).into();
    for (i, b) in buffers.iter_mut().enumerate() {
        assert_eq!(b.host().as_ptr() as usize % 64, 0);
        b.host_mut().fill(i as u8);
    }
    for (i, b) in buffers.iter().enumerate() {
        assert!(b.host().iter().all(|x| *x == i as u8), "buffer {i}");
    }
}

/// Also memory that an earlier phase or child wrote; that of children used to keep its numbers.
#[test]
#[cfg(debug_assertions)]
fn buffers_start_as_nan() {
    let mut arena = room(1 << 12);
    for _ in 0..2 {
        let scope = arena.scope();
        for _ in 0..2 {
            let child = scope.child();
            let mut x: Buffer<'_, f32> = child.alloc("x", 100).unwrap();
            assert!(x.host().iter().all(|x| x.is_nan()));
            x.host_mut().fill(1.0);
        }
        let mut x: Buffer<'_, f64> = scope.alloc("x", 50).unwrap();
        assert!(x.host().iter().all(|x| x.is_nan()));
        x.host_mut().fill(1.0);
    }
}

/// Writes one byte past the `len` bytes of a buffer, in a scope or its child.
#[cfg(debug_assertions)]
fn overrun(len: usize, nested: bool) {
    let mut arena = room(1 << 12);
    let scope = arena.scope();
    let child = scope.child();
    let mut x: Buffer<'_, u8> = child.alloc("x", len).unwrap();
    drop(x);
    drop(child);
    let child;
    let place = if nested {
        child = scope.child();
        &child
    } else {
        &scope
    };
    x = place.alloc("x", len).unwrap();
    let end = x.host_mut().as_mut_ptr_range().end;
    #[allow(unsafe_code)]
    // SAFETY: the arena owns the byte: a redzone follows the buffer.
    unsafe {
        *end = 1;
    }
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "a buffer was written past its end")]
fn a_write_past_the_end_is_caught() {
    overrun(64, false);
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "a buffer was written past its end")]
fn a_write_past_the_end_is_caught_in_a_child() {
    overrun(128, true);
}

#[test]
fn sizes_that_overflow_are_refused() {
    let mut arena = room(1 << 12);
    let scope = arena.scope();
    for n in [usize::MAX, usize::MAX - 63, usize::MAX - 64, usize::MAX - 127, usize::MAX - 128] {
        let e = refusal(scope.alloc::<u8>("x", n));
        assert!(e.starts_with("x needs ") && e.ends_with(" are free"), "{e}");
    }
    let e = refusal(scope.alloc::<f64>("x", usize::MAX / 8 + 1));
    assert!(e.starts_with(&format!("x needs {} bytes", usize::MAX)), "{e}");
    assert_eq!(scope.used(), 0);
}
