//! JSON in which no object has a key twice: of two values one would be lost silently.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};

/// A value without a key that stands twice.
struct UniqueKeys(Value);

/// Reads a JSON text; a key that stands twice in an object is an error.
pub(super) fn parse(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text).map(|UniqueKeys(value)| value)
}

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ValueVisitor;
        impl<'de> Visitor<'de> for ValueVisitor {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_unit<E: Error>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E: Error>(self, b: bool) -> Result<Value, E> {
                Ok(b.into())
            }

            fn visit_i64<E: Error>(self, n: i64) -> Result<Value, E> {
                Ok(n.into())
            }

            fn visit_u64<E: Error>(self, n: u64) -> Result<Value, E> {
                Ok(n.into())
            }

            fn visit_f64<E: Error>(self, x: f64) -> Result<Value, E> {
                Ok(x.into())
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
                Ok(text.into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
                let mut all = Vec::new();
                while let Some(UniqueKeys(value)) = from.next_element()? {
                    all.push(value);
                }
                Ok(Value::Array(all))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
                let mut all = Map::new();
                while let Some((key, UniqueKeys(value))) = from.next_entry::<String, _>()? {
                    if all.contains_key(&key) {
                        return Err(A::Error::custom(format!("key {key:?} stands twice")));
                    }
                    all.insert(key, value);
                }
                Ok(Value::Object(all))
            }
        }
        from.deserialize_any(ValueVisitor).map(Self)
    }
}
