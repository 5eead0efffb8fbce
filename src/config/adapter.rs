//! `[[model.adapter]]`: LoRA adapters of a model, which its own workers serve.

use super::Adapter;
use super::defaults;
use super::model::{Taken, model_name};
use super::tree::{Refusal, Section};

/// `names` are those that clients ask for.
pub(super) fn read_all(model: &mut Section<'_>, names: &mut Taken) -> Vec<Adapter> {
    model.tables("adapter", "model.adapter").into_iter().filter_map(|section| read(section, names)).collect()
}

fn read(mut section: Section<'_>, names: &mut Taken) -> Option<Adapter> {
    let log = section.log;
    let name = section.required("name", "write the name that clients ask for, and workers know it by", model_name);
    let path = section.read("path", |raw| match raw.text()? {
        "" => Err(Refusal::new("must say where workers find the adapter (omit the key if they begin with it)")),
        path => Ok(path.to_owned()),
    });
    let memory = "where engines set the memory aside when they start";
    let memory_mib = section.optional_count("memory_mib", defaults::ADAPTER_MIB_LIMIT, memory);
    if let (None, Some(_)) = (&path, memory_mib) {
        log.refuse_absence(&section.at("memory_mib"), "without effect", "needs `path` beside it");
    }
    section.finish(&[]);
    let name = name?;
    names.take(log, &name.value, &name.at, "must be unique among names and aliases");
    Some(Adapter { name: name.value, path: path.map(|found| found.value), memory_mib })
}
