//! Our definition of the Open Inference Protocol, held against what others have written down of it.

use std::path::Path;

use protox::prost_reflect::{DescriptorPool, FieldDescriptor, Kind};

use crate::support::shared;

fn ours() -> DescriptorPool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
    let mut compiler = protox::Compiler::new([&root]).expect("a compiler");
    compiler.open_file(root.join("kserve/inference.proto")).expect("it compiles");
    compiler.descriptor_pool()
}

/// A type as the protocol's own language writes it.
fn written(field: &FieldDescriptor) -> String {
    match field.kind() {
        Kind::Message(message) if message.is_map_entry() => {
            format!("map<{}, {}>", written(&message.map_entry_key_field()), written(&message.map_entry_value_field()))
        }
        Kind::Message(message) => message.name().to_owned(),
        Kind::Enum(kind) => kind.name().to_owned(),
        kind => format!("{kind:?}").to_ascii_lowercase(),
    }
}

#[test]
fn names_numbers_and_types_are_the_protocols() {
    let Some(path) = shared("specs/open-inference-v2-grpc.md") else { return };
    let page = std::fs::read_to_string(path).expect("a readable page");
    let pool = ours();
    let service = pool.get_service_by_name("inference.GRPCInferenceService").expect("the service");
    let rows = page.lines().filter(|line| line.starts_with("| "));
    let (mut calls, mut fields) = (0, 0);
    for cells in rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>()) {
        match cells.as_slice() {
            ["rpc" | "message", ..] => {}
            [name, request, response] => {
                let call = service.methods().find(|call| call.name() == *name).unwrap_or_else(|| panic!("no {name}"));
                assert_eq!((call.input().name(), call.output().name()), (*request, *response));
                calls += 1;
            }
            [message, number, name, label, kind, oneof] => {
                let of =
                    pool.get_message_by_name(&format!("inference.{message}")).unwrap_or_else(|| panic!("no {message}"));
                let field = of.get_field_by_name(name).unwrap_or_else(|| panic!("no {message}.{name}"));
                assert_eq!(field.number().to_string(), *number, "{message}.{name}");
                assert_eq!(
                    (field.is_list(), written(&field).as_str()),
                    (*label == "repeated", *kind),
                    "{message}.{name}"
                );
                assert_eq!(field.containing_oneof().map(|oneof| oneof.name().to_owned()).unwrap_or_default(), *oneof);
                fields += 1;
            }
            _ => panic!("a row of another form: {cells:?}"),
        }
    }
    assert!(calls >= 6 && fields >= 50, "{calls} calls and {fields} fields were held against it");
}

/// What Triton adds stands in lines like `| Message | string name=1; repeated Thing things=2 |`.
#[test]
fn tritons_own_numbers_are_those_of_its_sources() {
    let Some(path) = shared("reference/engines.md") else { return };
    let page = std::fs::read_to_string(path).expect("a readable page");
    let pool = ours();
    let mut held = 0;
    for message in pool.all_messages().filter(|message| !message.is_map_entry()) {
        let name = message.full_name().trim_start_matches("inference.");
        let Some(line) = page.lines().find(|line| {
            line.strip_prefix("| ").is_some_and(|line| line.split([' ', '/']).next() == Some(name))
                || line.starts_with(&format!("`{name}`"))
        }) else {
            continue;
        };
        for field in message.fields() {
            // A field of the page's stands alone or with others of its type.
            let said = format!("{}={}", field.name(), field.number());
            let words: Vec<&str> = line.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '=')).collect();
            // Not all is on the page of what the protocol itself has; a name with another number is wrong.
            let named = words.iter().any(|word| word.split('=').next() == Some(field.name()) && word.contains('='));
            assert!(!named || words.contains(&said.as_str()), "{name}: {said} is not in {line}");
            held += usize::from(named);
        }
    }
    assert!(held >= 60, "{held} fields were held against it");
}
