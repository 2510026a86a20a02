//! Rows of a table: `y[r] = table[ids[r]]`, for token and position embeddings and for gathering
//! rows.

use crate::{
    device::{
        Cuda, Device, Element, Float, View, ViewMut, Work,
        cuda::{self, Launch, kernels::embedding as kernel},
    },
    error::{Error, Result},
    shape, simd,
};

fn check_ids(op: &str, ids: &[u32], rows: usize) -> Result<()> {
    match ids.iter().position(|id| *id as usize >= rows) {
        None => Ok(()),
        Some(i) => {
            Err(Error::value(format!("{op}: id of row {i}"), format!("less than {rows}"), ids[i]))
        }
    }
}

/// `y[r] = table[ids[r]]`, or `+=` with `add`: `y` `[rows, cols]`, `ids` `[rows]`, `table`
/// `[entries, cols]`; in f32 with the same bits on every device. Reads and writes `rows * cols`
/// elements.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] for an id beyond the table; on a
/// CUDA device its row becomes NaN instead.
pub fn forward<T: Element>(
    dev: &Device,
    y: ViewMut<'_, T>,
    ids: View<'_, u32>,
    table: View<'_, T>,
    add: bool,
) -> Result<()> {
    const OP: &str = "embedding";
    let rows = ids.len();
    if ids.is_empty() {
        return shape::check(OP, "y", &[0], y.len());
    }
    let cols = y.len() / rows;
    shape::check(OP, "y", &[rows, cols], y.len())?;
    let entries = shape::rows(OP, "table", table.len(), cols)?;
    let _op = dev.op(OP, || Work::moves::<T>(rows * cols * if add { 3 } else { 2 }));
    match dev {
        Device::Cpu(cpu) => {
            let (y, ids, table) = (y.float()?.host(), ids.host(), table.float()?.host());
            check_ids(OP, ids, entries)?;
            cpu.rows(rows, 64, (y, cols), |range, y| {
                for (y, id) in y.chunks_exact_mut(cols).zip(&ids[range]) {
                    let row = &table[*id as usize * cols..][..cols];
                    if add { add_row(cpu.isa(), y, row) } else { y.copy_from_slice(row) }
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let width = cuda::width::<T>(&[cols], &[y.address(), table.address()]);
            let launch = Launch::threads(rows * (cols / width), kernel::THREADS)?;
            let add = usize::from(add);
            kernel::Forward { y, ids, table, rows, entries, cols, add, width }.launch(cuda, launch)
        }
    }
}

/// Elements of scratch that [`backward`] and [`scatter`] need: the order of the rows by their ids.
pub fn scratch_len(rows: usize) -> usize {
    rows
}

/// The gradient of a table of weights: `dtable[ids[r]] += dy[r]`, rows in ascending order for each
/// entry; in f32 with the same bits on every device.
///
/// Reads dy, and the rows of `dtable` that there are ids of, which are not counted, and writes
/// them.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] for an id beyond the table; on a
/// CUDA device its row is left out instead.
pub fn backward<T: Element>(
    dev: &Device,
    dtable: ViewMut<'_, T::Acc>,
    scratch: ViewMut<'_, u64>,
    ids: View<'_, u32>,
    dy: View<'_, T>,
    cols: usize,
) -> Result<()> {
    let _op = dev.op("embedding::backward", || Work::moves::<T>(dy.len()));
    let add = |cuda: &Cuda, launch, of: AddRows<'_, _, T>| {
        let AddRows { dtable, sorted, dy, sizes: [rows, entries, cols, width] } = of;
        kernel::Backward { dtable, sorted, dy, rows, entries, cols, width }.launch(cuda, launch)
    };
    let rows = TableGradient { dtable, scratch, ids, dy, cols };
    add_rows("embedding::backward", dev, rows, add)
}

/// As [`backward`] where the table was rows of activations, whose gradient is stored as theirs:
/// puts rows back to where [`forward`] picked them.
///
/// Reads dy, and reads and writes as much of `dtable`.
pub fn scatter<T: Element>(
    dev: &Device,
    dtable: ViewMut<'_, T>,
    scratch: ViewMut<'_, u64>,
    ids: View<'_, u32>,
    dy: View<'_, T>,
    cols: usize,
) -> Result<()> {
    let _op = dev.op("embedding::scatter", || Work::moves::<T>(3 * dy.len()));
    let add = |cuda: &Cuda, launch, of: AddRows<'_, _, T>| {
        let AddRows { dtable, sorted, dy, sizes: [rows, entries, cols, width] } = of;
        kernel::Scatter { dtable, sorted, dy, rows, entries, cols, width }.launch(cuda, launch)
    };
    let rows = TableGradient { dtable, scratch, ids, dy, cols };
    add_rows("embedding::scatter", dev, rows, add)
}

/// What a kernel adds rows with.
struct AddRows<'a, D, T> {
    dtable: ViewMut<'a, D>,
    sorted: View<'a, u64>,
    dy: View<'a, T>,
    /// Rows, entries, columns, and elements that a thread takes at once.
    sizes: [usize; 4],
}

/// The arguments of [`backward`] and [`scatter`].
struct TableGradient<'a, D, T> {
    dtable: ViewMut<'a, D>,
    scratch: ViewMut<'a, u64>,
    ids: View<'a, u32>,
    dy: View<'a, T>,
    cols: usize,
}

fn add_rows<D: Element<Acc = T::Acc>, T: Element>(
    op: &'static str,
    dev: &Device,
    of: TableGradient<'_, D, T>,
    add: impl FnOnce(&Cuda, Launch, AddRows<'_, D, T>) -> Result<()>,
) -> Result<()> {
    let TableGradient { dtable, scratch, ids, dy, cols } = of;
    let rows = ids.len();
    shape::check(op, "dy", &[rows, cols], dy.len())?;
    let entries = shape::rows(op, "dtable", dtable.len(), cols)?;
    let mut sorted = scratch.scratch(op, scratch_len(rows))?;
    match dev {
        Device::Cpu(cpu) => {
            let (dtable, ids, dy) = (dtable.float()?.host(), ids.host(), dy.float()?.host());
            check_ids(op, ids, entries)?;
            // A task owns a range of entries and takes the rows that belong to it.
            cpu.rows(entries, 32, (dtable, cols), |range, dtable| {
                for (id, dy) in ids.iter().zip(dy.chunks_exact(cols)) {
                    let id = *id as usize;
                    if range.contains(&id) {
                        add_row(cpu.isa(), &mut dtable[(id - range.start) * cols..][..cols], dy);
                    }
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::row(rows.div_ceil(32), kernel::THREADS * 4)?;
            kernel::Sort { sorted: sorted.reborrow(), ids, rows }.launch(cuda, launch)?;
            let width = cuda::width::<T>(&[cols], &[dtable.address(), dy.address()]);
            let launch = Launch::threads(rows * (cols / width), kernel::THREADS)?;
            let sizes = [rows, entries, cols, width];
            add(cuda, launch, AddRows { dtable, sorted: sorted.view(), dy, sizes })
        }
    }
}

simd! {
    fn add_row[F: Float](y: &mut [F], x: &[F]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += *x;
        }
    }
}
