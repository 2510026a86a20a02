//! Rows of a table: `y[r] = table[ids[r]]`, for token and position embeddings and for gathering
//! rows.

use crate::{
    device::{Device, Float, View, ViewMut},
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
/// `[entries, cols]`. Reads and writes `rows * cols` elements.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] for an id beyond the table.
pub fn forward<F: Float>(
    dev: &Device,
    y: ViewMut<'_, F>,
    ids: View<'_, u32>,
    table: View<'_, F>,
    add: bool,
) -> Result<()> {
    let cpu = dev.on_cpu("embedding")?;
    let (y, ids, table) = (y.host(), ids.host(), table.host());
    if ids.is_empty() {
        return shape::check("embedding", "y", &[0], y.len());
    }
    let cols = y.len() / ids.len();
    shape::check("embedding", "y", &[ids.len(), cols], y.len())?;
    let entries = shape::rows("embedding", "table", table.len(), cols)?;
    check_ids("embedding", ids, entries)?;
    cpu.rows(ids.len(), 64, (y, cols), |range, y| {
        for (y, id) in y.chunks_exact_mut(cols).zip(&ids[range]) {
            let row = &table[*id as usize * cols..][..cols];
            if add { add_row(cpu.isa(), y, row) } else { y.copy_from_slice(row) }
        }
    });
    Ok(())
}

/// `dtable[ids[r]] += dy[r]`, rows in ascending order for each entry.
///
/// # Errors
/// [`Error::Shape`] if a buffer does not fit, [`Error::Value`] for an id beyond the table.
pub fn backward<F: Float>(
    dev: &Device,
    dtable: ViewMut<'_, F>,
    ids: View<'_, u32>,
    dy: View<'_, F>,
    cols: usize,
) -> Result<()> {
    let cpu = dev.on_cpu("embedding::backward")?;
    let (dtable, ids, dy) = (dtable.host(), ids.host(), dy.host());
    shape::check("embedding::backward", "dy", &[ids.len(), cols], dy.len())?;
    let entries = shape::rows("embedding::backward", "dtable", dtable.len(), cols)?;
    check_ids("embedding::backward", ids, entries)?;
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

simd! {
    fn add_row[F: Float](y: &mut [F], x: &[F]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += *x;
        }
    }
}
