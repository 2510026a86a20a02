//! Parquet: each row as the JSON object that the other formats would have.

use std::{
    cell::Cell,
    fs::File,
    panic::{self, AssertUnwindSafe},
    path::Path,
    sync::Once,
};

use parquet::{
    file::{reader::FileReader, serialized_reader::SerializedFileReader},
    record::{Field, reader::RowIter},
    schema::types::Type,
};
use serde_json::{Map, Number, Value};

use super::Take;
use crate::{
    data::options::ReadOptions,
    error::{Error, Result},
};

/// Gives each row, counted from 1. Columns that no record is made of are not read.
pub(super) fn rows(path: &Path, options: &ReadOptions, take: &mut Take<'_>) -> Result<()> {
    let corrupt = |e: String| Error::file(path, format!("is Parquet that cannot be read: {e}"));
    let file = File::open(path).map_err(Error::io("open", path))?;
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(corrupt)?;
    let schema = reader.metadata().file_metadata().schema();
    let known = |column: &&parquet::schema::types::TypePtr| options.reads(column.name());
    let mut columns: Vec<_> = schema.get_fields().iter().filter(known).cloned().collect();
    if columns.is_empty() {
        // What there is instead is said of the first row.
        columns = schema.get_fields().to_vec();
    }
    if let Some(i) =
        (1..columns.len()).find(|i| columns[..*i].iter().any(|c| c.name() == columns[*i].name()))
    {
        return Err(Error::file(path, format!("has column {:?} twice", columns[i].name())));
    }
    let wanted = Type::group_type_builder(schema.name()).with_fields(columns).build();
    let wanted = wanted.map_err(|e| corrupt(e.to_string()))?;
    let mut all = guarded(|| RowIter::from_file(Some(wanted), &reader)).map_err(corrupt)?;
    for line in 1.. {
        let next = guarded(|| all.next().transpose());
        let failed = |e| corrupt(format!("{e} (row {line})"));
        let Some(row) = next.map_err(failed)? else { return Ok(()) };
        match object(row.into_columns()) {
            Ok(object) => take(line, Ok(&object.to_string()))?,
            Err(e) => take(line, Err(e))?,
        }
    }
    Ok(())
}

/// Named fields as an object.
fn object(fields: Vec<(String, Field)>) -> Result<Value, String> {
    let read = |(name, field): (String, Field)| {
        let value = value(field).map_err(|e| format!("column {name:?}: {e}"))?;
        Ok((name, value))
    };
    fields.into_iter().map(read).collect::<Result<Map<_, _>, _>>().map(Value::Object)
}

fn value(field: Field) -> Result<Value, String> {
    let number = |x: f64| Number::from_f64(x).map(Value::Number).ok_or_else(|| format!("is {x}"));
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(b) => b.into(),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float16(x) => number(x.into())?,
        // The shortest decimal of the f32, as other formats would have it.
        Field::Float(x) => number(x.to_string().parse().unwrap_or(f64::NAN))?,
        Field::Double(x) => number(x)?,
        Field::Str(text) => text.into(),
        // Some writers do not say that bytes are text.
        Field::Bytes(bytes) => {
            let text = std::str::from_utf8(bytes.data());
            text.map_err(|_| "has bytes, wanted text".to_owned())?.into()
        }
        Field::Group(row) => object(row.into_columns())?,
        Field::ListInternal(list) => {
            list.elements().iter().cloned().map(value).collect::<Result<_, _>>()?
        }
        Field::MapInternal(map) => {
            let mut all = Map::new();
            for (key, of) in map.entries() {
                let Value::String(key) = value(key.clone())? else {
                    return Err("has a map whose keys are no texts".into());
                };
                let of = value(of.clone())?;
                if all.insert(key.clone(), of).is_some() {
                    return Err(format!("has key {key:?} twice"));
                }
            }
            Value::Object(all)
        }
        _ => return Err("has a date, a time or a decimal, wanted text or numbers".into()),
    })
}

thread_local! {
    /// A panic here is told as an error of the file.
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a call into the library, which panics at some files that are damaged.
fn guarded<R>(call: impl FnOnce() -> parquet::errors::Result<R>) -> Result<R, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !IS_GUARDED.get() {
                before(info);
            }
        }));
    });
    IS_GUARDED.set(true);
    let done = panic::catch_unwind(AssertUnwindSafe(call));
    IS_GUARDED.set(false);
    match done {
        Ok(read) => read.map_err(|e| e.to_string()),
        Err(what) => {
            let text = what.downcast_ref::<String>().cloned();
            let text = text.or_else(|| what.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Err(format!("it is damaged ({})", text.unwrap_or_default()))
        }
    }
}
