//! Several products at once, such as those of the experts of a mixture.

use super::{Cpu, Float, NR, Out, Product, block, block_rows, check, split};

impl<F> Out<F> {
    /// The same from row `first` on.
    ///
    /// # Safety
    /// The row is inside C, or its end.
    unsafe fn at_row(&self, first: usize) -> Self {
        // SAFETY: the caller's promise.
        Self { c: unsafe { self.c.add(first * self.ldc) }, ldc: self.ldc }
    }
}

/// The products of `parts`, each with the row of C that its own rows begin at, on all threads:
/// `C(i, j) = c[(first + i) * ldc + j]`. Every output is the chain that [`super::product`] makes.
///
/// # Panics
/// If a slice is too short for the sizes, or the parts do not follow each other in C.
pub fn products<F: Float>(cpu: &Cpu, c: &mut [F], ldc: usize, parts: &[(usize, Product<'_, F>)]) {
    let work = |p: &Product<'_, F>| {
        let (m, n, k) = p.sizes;
        m.saturating_mul(n).saturating_mul(k)
    };
    let (mut end, mut all) = (0, 0usize);
    for (first, p) in parts {
        assert!(*first >= end, "rows of C from {first} on belong to two products");
        check(&c[first * ldc..], ldc, p);
        (end, all) = (first + p.sizes.0, all.saturating_add(work(p)));
    }
    // As for one product: small ones are not handed over, large ones make four tasks a thread.
    let alone = all < 100_000;
    let want = if alone { 1 } else { cpu.threads() * 4 };
    let mut tasks = Vec::new();
    for (i, (_, p)) in parts.iter().enumerate() {
        let ((m, n, k), share) = (p.sizes, want.saturating_mul(work(p)).div_ceil(all.max(1)));
        let panels = n.div_ceil(NR);
        let mc = block_rows(p.a, p.b);
        let (rows, per) = split((m, panels), share.max(1), p.a.copied(k), p.b, mc);
        for i0 in (0..m).step_by(rows) {
            for p0 in (0..panels).step_by(per) {
                tasks.push((i, (i0, (i0 + rows).min(m)), (p0, (p0 + per).min(panels))));
            }
        }
    }
    let out = Out { c: c.as_mut_ptr(), ldc };
    let run = |task: usize| {
        let (i, rows, panels) = tasks[task];
        let (first, product) = &parts[i];
        // SAFETY: `check` took the rows from there on.
        let out = unsafe { out.at_row(*first) };
        // SAFETY: `check` bounds C, A and B; parts own rows that follow each other, and their
        // tasks disjoint rectangles of them.
        unsafe { block(cpu.isa(), &out, rows, panels, product) };
    };
    if alone { (0..tasks.len()).for_each(run) } else { cpu.run(tasks.len(), run) }
}
