//! A schema that is wrong in one way at a time, against types that stand for ours.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::*;
use crate::command::CpuModelExpansion;

#[derive(Deserialize, Serialize)]
struct Ask {
    whom: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    how: Option<CpuModelExpansion>,
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "only its shape matters")]
struct Said {
    what: u64,
    loud: Option<bool>,
    depth: CpuModelExpansion,
}

impl Command for Ask {
    const NAME: &'static str = "ask";
    type Reply = Vec<Said>;
}

/// What agrees with the types above, after `change`.
fn differences(change: impl FnOnce(&mut Value)) -> Vec<String> {
    let mut entries = json!([
        {"name": "ask", "meta-type": "command", "arg-type": "1", "ret-type": "[2]"},
        {"name": "1", "meta-type": "object", "members": [
            {"name": "whom", "type": "str"}, {"name": "how", "type": "3", "default": null}]},
        {"name": "[2]", "meta-type": "array", "element-type": "2"},
        {"name": "2", "meta-type": "object", "members": [
            {"name": "what", "type": "int"}, {"name": "loud", "type": "bool", "default": null},
            {"name": "depth", "type": "3"}, {"name": "new", "type": "int"}]},
        {"name": "3", "meta-type": "enum", "members": [
            {"name": "static"}, {"name": "full"}, {"name": "newer"}]},
        {"name": "str", "meta-type": "builtin", "json-type": "string"},
        {"name": "int", "meta-type": "builtin", "json-type": "int"},
        {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
    ]);
    change(&mut entries);
    let schema = Schema::new(serde_json::from_value(entries).unwrap());
    let mut findings = Findings::default();
    findings.compare(&schema, &Typed::command::<Ask>());
    findings.end().iter().map(ToString::to_string).collect()
}

#[test]
fn a_schema_that_knows_more_than_we_do_agrees() {
    assert_eq!(differences(|_| {}), [""; 0]);
}

#[test]
fn what_a_schema_lacks_is_named_by_type_and_member() {
    assert_eq!(
        differences(|all| all[1]["members"][1]["name"] = json!("why")),
        ["argument Ask.how of ask"]
    );
    assert_eq!(
        differences(|all| all[3]["members"][1]["name"] = json!("shout")),
        ["member Said.loud in ask"]
    );
    assert_eq!(
        differences(|all| all[4]["members"][1]["name"] = json!("fuller")),
        ["value CpuModelExpansion.full in ask"]
    );
}

#[test]
fn what_could_not_be_sent_or_read_is_a_contradiction() {
    let one = |change: fn(&mut Value)| {
        let mut found = differences(change);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    };
    let text = one(|all| all[3]["members"][0]["default"] = Value::Null);
    assert!(text.contains("missing field `what`"), "{text}");
    let text = one(|all| all[1]["members"][1] = json!({"name": "how", "type": "3"}));
    assert!(text.contains("`how` is required"), "{text}");
    let text = one(|all| all[3]["members"][0]["type"] = json!("str"));
    assert!(text.contains("what: invalid type: string"), "{text}");
    let text = one(|all| all[0]["allow-oob"] = json!(true));
    assert!(text.contains("may run out of band"), "{text}");
}

#[test]
fn an_older_qemu_is_not_blamed_for_what_came_later() {
    let release = |major, minor| {
        let text = format!(r#"{{"major":{major},"minor":{minor},"micro":0}}"#);
        serde_json::from_str::<Release>(&text).unwrap()
    };
    let mut findings = Findings::default();
    let what = "MigrateIncoming.exit-on-error".to_owned();
    findings.add("migrate-incoming", what, DifferenceKind::Argument);
    let lack = &findings.end()[0];
    assert!(lack.is_expected_of(release(7, 2)));
    assert!(!lack.is_expected_of(release(9, 1)));
}
