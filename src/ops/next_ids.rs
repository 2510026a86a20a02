//! Ids of a pass that were drawn by the pass before, and go from one to the other on the device: so
//! the next pass is queued before the host has read them.

use crate::{
    device::{
        Device, View, ViewMut, Work,
        cuda::{Launch, kernels::next_ids as kernel},
    },
    error::{Error, Result},
    shape,
};

/// `ids[rows[i]] = tokens[from[i]]`: `ids` `[all]`, `rows` and `from` `[count]`, no row twice,
/// `tokens` `[drawn]`. The other ids stay.
///
/// Reads `rows`, `from` and as many tokens, writes as many ids.
///
/// # Errors
/// [`Error::Shape`] if `rows` and `from` differ in length, [`Error::Value`] for a row beyond the
/// ids or a source beyond the tokens; on a CUDA device such a row is left out, and the id of such a
/// source is `u32::MAX`, which no table has.
pub fn forward(
    dev: &Device,
    ids: ViewMut<'_, u32>,
    rows: View<'_, u32>,
    from: View<'_, u32>,
    tokens: View<'_, u32>,
) -> Result<()> {
    const OP: &str = "next_ids";
    let (count, all, drawn) = (rows.len(), ids.len(), tokens.len());
    shape::check(OP, "from", &[count], from.len())?;
    let _op = dev.op(OP, || Work::moves::<u32>(4 * count));
    match dev {
        Device::Cpu(_) => {
            let (ids, rows, from, tokens) = (ids.host(), rows.host(), from.host(), tokens.host());
            for (what, at, len) in [("row", rows, all), ("source", from, drawn)] {
                if let Some(i) = at.iter().position(|at| *at as usize >= len) {
                    let (what, want) = (format!("{OP}: {what} {i}"), format!("less than {len}"));
                    return Err(Error::value(what, want, at[i]));
                }
            }
            for (row, from) in rows.iter().zip(from) {
                ids[*row as usize] = tokens[*from as usize];
            }
            Ok(())
        }
        Device::Cuda(cuda) => {
            let launch = Launch::threads(count, kernel::THREADS)?;
            kernel::Forward { ids, rows, from, tokens, count, all, drawn }.launch(cuda, launch)
        }
    }
}
