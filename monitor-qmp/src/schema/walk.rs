//! A type filled by serde from a sample that a schema gives, to learn what the type knows.
//!
//! serde tells a deserializer which members a struct has and which names an enum has. So the
//! sample is not built first: it is made as the type asks for it, and what was asked is noted.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    vec,
};

use serde::{
    Deserializer,
    de::{
        DeserializeOwned, DeserializeSeed, Error as _, IntoDeserializer, MapAccess, SeqAccess,
        Visitor, value,
    },
    forward_to_deserialize_any,
};

use super::Schema;
use crate::command::{SchemaEntry, SchemaMember};

/// How deep optional members are sampled: types may contain themselves.
const DEPTH: usize = 5;

/// What serde_json calls text that is to be kept as it is. It asks any format for it by this
/// name and wants one entry of the same name.
const RAW: &str = "$serde_json::private::RawValue";

/// Which members a sample has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sample<'a> {
    /// All.
    Full,
    /// Those that are not optional.
    Required,
    /// All but this one of the outermost object.
    Without(&'a str),
}

/// One filling of one type.
pub(super) struct Walk<'a> {
    schema: &'a Schema,
    sample: Sample<'a>,
    /// Which case, where there are several.
    choice: usize,
    top_is_closed: Cell<bool>,
    members: RefCell<BTreeMap<(&'static str, &'static str), bool>>,
    values: RefCell<BTreeSet<(&'static str, &'static str)>>,
}

type Failed = value::Error;

/// Fills a `T` from a sample of the schema's `type_name`. A case that only QEMU knows is no
/// failure: it may know more than we do.
pub(super) fn fill<T: DeserializeOwned>(walk: &Walk<'_>, type_name: &str) -> Result<(), String> {
    let node = Node {
        walk,
        type_name,
        depth: 0,
        tag: None,
    };
    match T::deserialize(node) {
        Ok(_) => Ok(()),
        Err(error) => match error.to_string() {
            only_theirs if only_theirs.contains("unknown variant") => Ok(()),
            text => Err(text),
        },
    }
}

impl<'a> Walk<'a> {
    pub(super) fn new(schema: &'a Schema, sample: Sample<'a>, choice: usize) -> Self {
        Self {
            schema,
            sample,
            choice,
            top_is_closed: Cell::new(false),
            members: RefCell::default(),
            values: RefCell::default(),
        }
    }

    /// Whether the outermost type takes no members but those it names.
    pub(super) fn top_is_closed(&self) -> bool {
        self.top_is_closed.get()
    }

    /// The members that our types have, by type, and whether the schema has them.
    pub(super) fn members(&self) -> Vec<(&'static str, &'static str, bool)> {
        let members = self.members.borrow();
        members
            .iter()
            .map(|((owner, member), known)| (*owner, *member, *known))
            .collect()
    }

    /// The values that our enums have and the schema has not.
    pub(super) fn unknown_values(&self) -> Vec<(&'static str, &'static str)> {
        self.values.borrow().iter().copied().collect()
    }

    fn pick<'t, T>(&self, among: &'t [T]) -> Option<&'t T> {
        among.get(self.choice.checked_rem(among.len())?)
    }
}

/// A value of some type of the schema.
#[derive(Clone, Copy)]
struct Node<'w> {
    walk: &'w Walk<'w>,
    type_name: &'w str,
    depth: usize,
    /// If this value tells which case its object is, where to leave it.
    tag: Option<&'w RefCell<String>>,
}

impl<'w> Node<'w> {
    fn entry(&self) -> Result<&'w SchemaEntry, Failed> {
        let entry = self.walk.schema.entries.get(self.type_name);
        entry.ok_or_else(|| Failed::custom(format!("the schema lacks type {}", self.type_name)))
    }

    /// This value, or of an alternate the case that `fits`, or else any.
    fn resolved(self, fits: impl Fn(&SchemaEntry) -> bool) -> Result<Self, Failed> {
        let entry = self.entry()?;
        if entry.meta_type != "alternate" {
            return Ok(self);
        }
        let types: Vec<&str> = entry
            .members
            .iter()
            .filter_map(|member| member.member_type.as_deref())
            .collect();
        let entries = &self.walk.schema.entries;
        let first = |fits: &dyn Fn(&SchemaEntry) -> bool| {
            let is_fit = |name: &&&str| entries.get(**name).is_some_and(fits);
            types.iter().find(is_fit)
        };
        let shallow = |entry: &SchemaEntry| self.depth >= DEPTH && entry.meta_type != "object";
        let type_name = first(&fits)
            .or_else(|| first(&shallow))
            .or_else(|| self.walk.pick(&types))
            .ok_or_else(|| Failed::custom("an alternate without cases"))?;
        Self { type_name, ..self }.resolved(fits)
    }

    fn scalar<'de, V: Visitor<'de>>(self, kind: &str, visitor: V) -> Result<V::Value, Failed> {
        let kind_of = |entry: &SchemaEntry| match entry.meta_type.as_str() {
            "enum" => "string".to_owned(),
            _ => entry.json_type.clone().unwrap_or_default(),
        };
        self.resolved(|entry| kind_of(entry) == kind)?
            .deserialize_any(visitor)
    }

    /// An enum's names, or one that stands for any string.
    fn names(entry: &SchemaEntry) -> Vec<&str> {
        match entry.meta_type.as_str() {
            "enum" => entry.members.iter().map(|one| one.name.as_str()).collect(),
            _ => vec!["x"],
        }
    }

    fn say_name(&self, name: &str) {
        if let Some(tag) = self.tag {
            name.clone_into(&mut tag.borrow_mut());
        }
    }
}

macro_rules! scalars {
    ($($method:ident => $kind:literal,)+) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
            self.scalar($kind, visitor)
        })+
    };
}

impl<'de> Deserializer<'de> for Node<'_> {
    type Error = Failed;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
        let node = self.resolved(|_| false)?;
        let entry = node.entry()?;
        match (entry.meta_type.as_str(), entry.json_type.as_deref()) {
            ("builtin", Some("string")) => visitor.visit_str("x"),
            ("builtin", Some("int")) => visitor.visit_u64(1),
            ("builtin", Some("number")) => visitor.visit_f64(1.5),
            ("builtin", Some("boolean")) => visitor.visit_bool(true),
            ("builtin", _) => visitor.visit_unit(),
            ("enum", _) => {
                let names = Self::names(entry);
                let name = node.walk.pick(&names).copied().unwrap_or("x");
                node.say_name(name);
                visitor.visit_str(name)
            }
            ("array", _) => visitor.visit_seq(Elements {
                node,
                left: usize::from(node.depth < DEPTH),
            }),
            _ => {
                let tag = RefCell::default();
                visitor.visit_map(Members::of(node, entry, &tag))
            }
        }
    }

    scalars! {
        deserialize_bool => "boolean",
        deserialize_i8 => "int",
        deserialize_i16 => "int",
        deserialize_i32 => "int",
        deserialize_i64 => "int",
        deserialize_u8 => "int",
        deserialize_u16 => "int",
        deserialize_u32 => "int",
        deserialize_u64 => "int",
        deserialize_f32 => "number",
        deserialize_f64 => "number",
        deserialize_str => "string",
        deserialize_string => "string",
        deserialize_identifier => "string",
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
        visitor.visit_some(self)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Failed> {
        let required = self.entry()?.members.iter();
        let mut required = required.filter(|member| member.default.is_none());
        match required.next() {
            Some(member) => Err(Failed::custom(format!("`{}` is required", member.name))),
            None => visitor.visit_unit(),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Failed> {
        if name == RAW {
            let entry = std::iter::once((RAW, "null"));
            return visitor.visit_map(value::MapDeserializer::new(entry));
        }
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        owner: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failed> {
        let node = self.resolved(|entry| entry.meta_type == "object")?;
        let known = node.walk.schema.members(node.type_name);
        let mut members = node.walk.members.borrow_mut();
        for field in fields {
            *members.entry((owner, field)).or_default() |= known.contains(field);
        }
        drop(members);
        if node.depth == 0 {
            node.walk.top_is_closed.set(true);
        }
        node.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        owner: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failed> {
        let node = self.resolved(|entry| entry.meta_type == "enum")?;
        let entry = node.entry()?;
        if !matches!(entry.meta_type.as_str(), "enum")
            && entry.json_type.as_deref() != Some("string")
        {
            return Err(Failed::custom(format!("{owner} is no name there")));
        }
        let names = Self::names(entry);
        if entry.meta_type == "enum" {
            let mut values = node.walk.values.borrow_mut();
            values.extend(
                variants
                    .iter()
                    .filter(|variant| !names.contains(variant))
                    .map(|variant| (owner, *variant)),
            );
        }
        let name = node.walk.pick(&names).copied().unwrap_or("x");
        node.say_name(name);
        visitor.visit_enum(IntoDeserializer::<Failed>::into_deserializer(name))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit seq tuple tuple_struct map
    }
}

/// The elements of an array.
struct Elements<'w> {
    node: Node<'w>,
    left: usize,
}

impl<'de> SeqAccess<'de> for Elements<'_> {
    type Error = Failed;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Failed> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        self.left = left;
        let element = self.node.entry()?.element_type.as_deref();
        let type_name = element.ok_or_else(|| Failed::custom("an array of nothing"))?;
        let node = Node {
            type_name,
            depth: self.node.depth + 1,
            tag: None,
            ..self.node
        };
        seed.deserialize(node).map(Some)
    }
}

/// The members of an object: the tag first, since it tells which others there are.
struct Members<'t, 'w> {
    node: Node<'w>,
    entry: &'w SchemaEntry,
    left: vec::IntoIter<&'w SchemaMember>,
    current: Option<&'w SchemaMember>,
    tag: &'t RefCell<String>,
    is_expanded: bool,
}

impl<'t, 'w> Members<'t, 'w> {
    fn of(node: Node<'w>, entry: &'w SchemaEntry, tag: &'t RefCell<String>) -> Self {
        let mut members: Vec<_> = entry.members.iter().collect();
        members.sort_by_key(|member| entry.tag.as_deref() != Some(member.name.as_str()));
        Self {
            node,
            entry,
            left: members.into_iter(),
            current: None,
            tag,
            is_expanded: false,
        }
    }

    fn is_wanted(&self, member: &SchemaMember) -> bool {
        let is_required = member.default.is_none();
        match self.node.walk.sample {
            Sample::Full => is_required || self.node.depth < DEPTH,
            Sample::Required => is_required,
            Sample::Without(name) => {
                (self.node.depth > 0 || member.name != name)
                    && (is_required || self.node.depth < DEPTH)
            }
        }
    }

    fn next_member(&mut self) -> Option<&'w SchemaMember> {
        loop {
            if let Some(member) = self.left.next() {
                if self.is_wanted(member) {
                    return Some(member);
                }
                continue;
            }
            if std::mem::replace(&mut self.is_expanded, true) {
                return None;
            }
            let case = self.tag.borrow();
            let variants = self.entry.variants.iter();
            let variant = variants.into_iter().find(|variant| variant.case == *case)?;
            let added = self.node.walk.schema.entries.get(&variant.variant_type)?;
            self.left = added.members.iter().collect::<Vec<_>>().into_iter();
        }
    }
}

impl<'de> MapAccess<'de> for Members<'_, '_> {
    type Error = Failed;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Failed> {
        self.current = self.next_member();
        let Some(member) = self.current else {
            return Ok(None);
        };
        let key: value::StrDeserializer<'_, Failed> = member.name.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Failed> {
        let member = self.current.take();
        let member = member.ok_or_else(|| Failed::custom("a value without its key"))?;
        let type_name = member.member_type.as_deref();
        let is_tag = self.entry.tag.as_deref() == Some(member.name.as_str());
        let node = Node {
            walk: self.node.walk,
            type_name: type_name.ok_or_else(|| Failed::custom("a member without type"))?,
            depth: self.node.depth + 1,
            tag: is_tag.then_some(self.tag),
        };
        seed.deserialize(node)
            .map_err(|error| Failed::custom(format!("{}: {error}", member.name)))
    }
}
