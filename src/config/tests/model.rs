//! `[[model]]`, and what stands in it beside its workers.

use super::*;

#[test]
fn models_that_take_turns_in_a_gpu() {
    let text = "[[node]]\nname = 'a'\ngpu_memory_gib = 80\n[[node]]\nname = 'b'\nagent = 'http://b'\n\
                [[model]]\nname = 'm'\n[[model.worker]]\nurl = 'http://a:1'\ngpus = ['a/0', 'a/1']\nsleep = true\n\
                memory_gib = 40\nawake_seconds_min = 5\n[[model.worker]]\nurl = 'http://a:2'";
    let config = reader([]).text("f.toml", text).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    let [a, b] = &config.nodes[..] else { panic!("{config:?}") };
    assert_eq!((&a.agent, a.gpu_memory_gib), (&None, NonZeroU32::new(80)));
    assert_eq!(b.agent.as_ref().map(Url::as_str), Some("http://b:7072/"), "an agent's usual port");
    let [turns, stays] = &config.models[0].workers[..] else { panic!("{config:?}") };
    assert_eq!((turns.sleep, turns.memory_gib, turns.awake_min), (true, NonZeroU32::new(40), Duration::from_secs(5)));
    assert_eq!((stays.sleep, stays.memory_gib, stays.awake_min), (false, None, Duration::from_secs(30)));
    let refuse = |text: &str, expect: &str| {
        let said = reader([]).text("f.toml", text).unwrap_err().to_string();
        assert!(said.contains(expect), "{said}");
    };
    let model = "[[model]]\nname = 'm'\n[[model.worker]]\nurl = 'http://a:1'\n";
    let ranks = format!("{model}kv_events = 'tcp://a:5557'\ndata_parallel = 2");
    refuse(&ranks, "data_parallel is 2: cannot stand beside `sleep`, nor beside `kv_events`");
    let node = "[[node]]\nname = 'a'\nagent = 'http://a:7072'\n";
    refuse(&format!("{model}sleep = true"), "sleep is true: needs `gpus` beside it");
    // Neither of these stands in the way of another.
    let many = format!("[[node]]\nname = 'a'\ngpu_memory_gib = 0\n{model}gpus = ['a/0', 'b/0']\nsleep = true");
    let bad_gpus = format!("{node}{model}gpus = ['b/0']\nsleep = true\nmemory_gib = 0");
    let bad_sleep = format!("{model}sleep = 1\nawake_seconds_min = 5");
    for (text, keys) in [
        (many, &["node[0].gpu_memory_gib", "model[0].worker[0].gpus[1]"][..]),
        (bad_gpus, &["model[0].worker[0].gpus[0]", "model[0].worker[0].memory_gib"]),
        (bad_sleep, &["model[0].worker[0].sleep"]),
    ] {
        let mistakes = reader([]).text("f.toml", &text).unwrap_err();
        assert_eq!(mistakes.iter().map(|mistake| &mistake.key[..]).collect::<Vec<_>>(), keys, "{mistakes}");
    }
    refuse(&format!("{node}{model}gpus = []\nsleep = true"), "sleep is true: needs `gpus` beside it");
    for sleep in ["", "sleep = false\n"] {
        let idle = format!("{node}{model}gpus = ['a/0']\n{sleep}awake_seconds_min = 5");
        refuse(&idle, "awake_seconds_min is without effect: needs `sleep = true` beside it");
    }
    let sized = |node: &str, gib: u32| format!("[[node]]\nname = '{node}'\ngpu_memory_gib = {gib}\n");
    let (big, small) = (sized("big", 80), sized("small", 24));
    let large = format!("{big}{small}{model}gpus = ['big/0', 'small/0']\nmemory_gib = ");
    assert!(reader([]).text("f.toml", &format!("{large}24")).is_ok());
    let remedy = "must be at most 24, the `gpu_memory_gib` of node small";
    refuse(&format!("{large}25"), &format!("f.toml:12:14: model[0].worker[0].memory_gib is 25: {remedy}"));
    let twice = format!("{node}{model}gpus = ['a/0', 'a/1', 'a/0']");
    refuse(&twice, "gpus[2] is \"a/0\": must name each GPU once");
    let same = format!("{node}[[node]]\nname = 'b'\nagent = 'http://a'\n{model}");
    refuse(&same, "must be the agent of one node: ");
    refuse(&format!("[[node]]\nname = 'a'\n{model}"), "node[0].agent is missing");
    let kept = reader([]).text("f.toml", &format!("[[node]]\nname = 'a'\nagent = 'http://a:80'\n{model}")).unwrap();
    assert_eq!(kept.nodes[0].agent.as_ref().and_then(Url::port_or_known_default), Some(80), "as it was written");
}

#[test]
fn adapters_of_a_model() {
    let worker = "[[model.worker]]\nurl = 'http://a:1'\n";
    let text = format!(
        "[[model]]\nname = 'm'\nadapters_max = 3\n{worker}[[model.adapter]]\nname = 'sql'\npath = '/a/sql'\nmemory_mib = 64\n\
         [[model.adapter]]\nname = 'law'\n[[model]]\nname = 'n'\n[[model.fallback]]\nto = 'sql'\n[[model.worker]]\nurl = 'http://a:2'"
    );
    let config = reader([]).text("f.toml", &text).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    let model = &config.models[0];
    let [sql, law] = &model.adapters[..] else { panic!("{config:?}") };
    assert_eq!((&*sql.name, sql.path.as_deref(), sql.memory_mib), ("sql", Some("/a/sql"), NonZeroU32::new(64)));
    assert_eq!((&*law.name, law.path.as_deref(), model.adapters_max), ("law", None, NonZeroU32::new(3)));
    let refuse = |adapter: &str, expect: &str| {
        let text = format!("[[model]]\nname = 'm'\naliases = ['b']\n{worker}[[model.adapter]]\n{adapter}");
        let said = reader([]).text("f.toml", &text).unwrap_err().to_string();
        assert!(said.contains(expect), "{said}");
    };
    refuse("path = '/a'", "adapter[0].name is missing");
    refuse("name = 'b'", "must be unique among names and aliases");
    refuse("name = 'x*'", "must be a whole name");
    refuse("name = 'x'\npath = ''", "must say where workers find the adapter");
    refuse("name = 'x'\nmemory_mib = 1", "memory_mib is without effect: needs `path` beside it");
    refuse("name = 'x'\nrank = 1", "adapter[0].rank");
}

#[test]
fn model_values() {
    check(
        "",
        &[
            "f.toml:1:1: model is missing: add a `[[model]]` and its workers (engines are looked for only where there is no file)",
        ],
    );
    check(
        "\n[[model]]\n",
        &[
            "f.toml:2:1: model[0].name is missing: write the name that clients ask for",
            "f.toml:2:1: model[0].worker is missing: add a `[[model.worker]]` with its `url` below the model, or a `[[model.discover]]`",
        ],
    );
    check(
        "model = []",
        &[
            "f.toml:1:1: model is missing: add a `[[model]]` and its workers (engines are looked for only where there is no file)",
        ],
    );
    check(
        "[model]\nname = 'm'\n[[model.worker]]\nurl = 'http://w:1'",
        &["f.toml:1:1: model[0] is a table: must be a list of tables: write `[[model]]`"],
    );
    check("model = [1]", &["f.toml:1:10: model[0] is 1: must be a list of tables: write `[[model]]`"]);
    check_model(
        "queue_requests_max = 0\nmax_model_len = '8k'\nattempts_max = 17\nidle_seconds = 0\nqueue_bytes_max = 1",
        &[
            "f.toml:3:22: model[0].queue_requests_max is 0: must be at least 1 (omit the key for the default 4096)",
            "f.toml:4:17: model[0].max_model_len is \"8k\": must be a whole number from 1 to 4294967295 (omit the key to take what the workers report)",
            "f.toml:5:16: model[0].attempts_max is 17: must be at most 16 (omit the key for the default 3)",
            "f.toml:6:16: model[0].idle_seconds is 0: must be at least 1 (omit the key for the default 60)",
            "f.toml:7:19: model[0].queue_bytes_max is 1: must be at least 33554432 (omit the key for the default 268435456)",
        ],
    );
    check_model(
        "policy = 'random'\nqueue_tokens_max = 0\nworker_grace_seconds = -1",
        &[
            "f.toml:3:10: model[0].policy is \"random\": must be one of forebay, round-robin, least-requests (omit the key for forebay)",
            "f.toml:4:20: model[0].queue_tokens_max is 0: must be at least 1 (omit the key for the default 16777216)",
            "f.toml:5:24: model[0].worker_grace_seconds is -1: must be at least 0 (omit the key for the default 2)",
        ],
    );
    check(
        "[[model]]\nname = 'm'\n[model.classes]\ndefault = 1.5\nbatch = 'some'\nbulk = 0.1\n[[model.worker]]\nurl = 'http://w:1'",
        &[
            "f.toml:4:11: model[0].classes.default is 1.5: must be a number from 0 to 1 (omit the key for the default 0.1)",
            "f.toml:5:9: model[0].classes.batch is \"some\": must be a number from 0 to 1 (omit the key for the default 0.02)",
            "f.toml:6:1: model[0].classes.bulk is not a known key: known here: interactive, default, batch",
        ],
    );
    check(
        "[[model]]\nname = 'm'\n[model.classes]\ninteractive = 1\n[[model.worker]]\nurl = 'http://w:1'",
        &["f.toml:3:1: model[0].classes is 1.12: the shares of the classes must be at most 1 together"],
    );
    check_model("classes = 1", &["f.toml:3:11: model[0].classes is 1: must be a table: write `[model.classes]`"]);
    check_model(
        "micro_batch = { max_tokens = 2_000_000, max_delay_ms = 0.5, delay = 1 }",
        &[
            "f.toml:3:30: model[0].micro_batch.max_tokens is 2_000_000: must be at most 1048576 (omit the key for the default 8192)",
            "f.toml:3:56: model[0].micro_batch.max_delay_ms is 0.5: must be a whole number from 0 to 10000 (omit the key for the default 5)",
            "f.toml:3:61: model[0].micro_batch.delay is not a known key: known here: max_tokens, max_delay_ms",
        ],
    );
    let off = format!("{MODEL}micro_batch.max_tokens = 0\n").replace("[[model.worker]]\nurl = 'http://w:1'\n", "");
    let off = reader([]).text("f.toml", &format!("{off}[[model.worker]]\nurl = 'http://w:1'\n")).unwrap();
    assert_eq!(off.models[0].micro_batch, None);
    let bad_name = "must be 1 to 256 bytes long, without control characters and without spaces at its ends";
    check_model(
        "aliases = ['é', '', 3]",
        &[
            &format!("f.toml:3:17: model[0].aliases[1] is \"\": {bad_name}"),
            "f.toml:3:21: model[0].aliases[2] is 3: must be a string in quotes",
        ],
    );
    check_model("aliases = 'a'", &["f.toml:3:11: model[0].aliases is \"a\": must be a list in square brackets"]);
}

#[test]
fn one_model_is_the_default_and_names_are_whole() {
    let model =
        |name: &str| format!("[[model]]\nname = '{name}'\ndefault = true\n[[model.worker]]\nurl = 'http://{name}:1'\n");
    check(
        &(model("a") + &model("b")),
        &[
            "f.toml:8:11: model[1].default is true: must stand at one model only: `model[0].default` (f.toml:3:11) is it already",
        ],
    );
    check(
        "[[model]]\nname = 'gpt-*'\n[[model.worker]]\nurl = 'http://w:1'\n",
        &["f.toml:2:8: model[0].name is \"gpt-*\": must be a whole name: write what holds a `*` among `aliases`"],
    );
    check_model("aliases = ['*', 'gpt-*']", &[]);
}

#[test]
fn fallbacks_and_hedges() {
    let config = reader([])
        .text(
            "f.toml",
            "[[model]]\nname = 'a'\nhedge_after_ms = 250\nfirst_token_seconds = 3\n\
             fallback = [{ to = 'big', on = ['context_length'] }, { to = 'c' }]\n[[model.worker]]\nurl = 'http://w:1'\n\
             [[model]]\nname = 'b'\naliases = ['big']\n[[model.fallback]]\nto = 'a'\n[[model.worker]]\nurl = 'http://w:2'\n\
             [[model]]\nname = 'c'\n[[model.worker]]\nurl = 'http://w:3'\n",
        )
        .unwrap();
    let [a, b, c] = &config.models[..] else { panic!("{config:?}") };
    let name = |text: &str| Name::new(text).unwrap();
    let usual = vec![Trouble::ContextLength, Trouble::Unavailable, Trouble::Error, Trouble::Deadline];
    let [first, second] = &a.fallbacks[..] else { panic!("{a:?}") };
    assert_eq!(*first, Fallback { to: name("big"), on: vec![Trouble::ContextLength] });
    assert_eq!(*second, Fallback { to: name("c"), on: usual });
    assert_eq!(
        (a.hedge_after, a.first_token_timeout),
        (Some(Duration::from_millis(250)), Some(Duration::from_secs(3)))
    );
    assert_eq!((b.fallbacks.len(), b.hedge_after, c.fallbacks.len()), (1, None, 0));

    let one_of =
        "one of context_length, unavailable, error, deadline, content_filter (omit `on` for all but content_filter)";
    check(
        "[[model]]\nname = 'a'\naliases = ['x']\nhedge_after_ms = 0\n\
         [[model.fallback]]\nto = 'x'\n[[model.fallback]]\nto = 'nobody'\non = ['errors']\n[[model.fallback]]\non = []\n\
         [[model.fallback]]\nto = 'b'\nmodel = 'b'\n[[model.fallback]]\nto = 'b'\n[[model.worker]]\nurl = 'http://w:1'\n\
         [[model]]\nname = 'b'\n[[model.worker]]\nurl = 'http://w:2'\n",
        &[
            "f.toml:4:18: model[0].hedge_after_ms is 0: must be at least 1 (omit the key to never ask twice)",
            "f.toml:6:6: model[0].fallback[0].to is \"x\": must be another model: this one leads back to itself",
            "f.toml:8:6: model[0].fallback[1].to is \"nobody\": must be a model of this file: a, b, x",
            &format!("f.toml:9:7: model[0].fallback[1].on[0] is \"errors\": must be {one_of}"),
            "f.toml:10:1: model[0].fallback[2].to is missing: write the name of the model that is to answer",
            &format!("f.toml:11:6: model[0].fallback[2].on is nothing: must name {one_of}"),
            "f.toml:14:1: model[0].fallback[3].model is not a known key: known here: to, on",
            "f.toml:16:6: model[0].fallback[4].to is \"b\": must stand once in a model: `model[0].fallback[3].to` (f.toml:13:6) leads there, too",
        ],
    );
}

#[test]
fn no_model_is_called_as_the_metrics_call_the_unknown_ones() {
    let rule = "is \"other\": must be another name: as `other` the metrics tell of the names that nobody configured";
    check(
        "[[model]]\nname = 'other'\n[[model.adapter]]\nname = 'other'\n[[model.worker]]\nurl = 'http://w'\n",
        &[&format!("f.toml:2:8: model[0].name {rule}"), &format!("f.toml:4:8: model[0].adapter[0].name {rule}")],
    );
    check("[[model]]\nname = 'Other'\naliases = ['other']\n[[model.worker]]\nname = 'other'\nurl = 'http://w'\n", &[]);
}

#[test]
fn a_version_has_a_model_and_is_not_the_latest() {
    for name in ["llama@", "@2", "llama@latest"] {
        let expect = format!(
            "f.toml:2:8: model[0].name is {name:?}: must have a name before its last `@`, and behind it a version (`latest` \
             means the newest of them)"
        );
        check(&format!("[[model]]\nname = '{name}'\n[[model.worker]]\nurl = 'http://w'\n"), &[&expect]);
    }
    check("[[model]]\nname = 'a@b@2'\naliases = ['a@latest']\n[[model.worker]]\nurl = 'http://w'\n", &[]);
}

#[test]
fn names_are_unique() {
    check(
        "[[model]]\nname = 'a'\naliases = ['b', 'b']\n[[model.worker]]\nurl = 'http://w:1'\n\
         [[model]]\nname = 'b'\naliases = ['a']\n[[model.worker]]\nname = 'w:1'\nurl = 'http://w:2'\n",
        &[
            "f.toml:3:17: model[0].aliases[1] is \"b\": must be unique among names and aliases: `model[0].aliases[0]` (f.toml:3:12) has it already",
            "f.toml:7:8: model[1].name is \"b\": must be unique among names and aliases: `model[0].aliases[0]` (f.toml:3:12) has it already",
            "f.toml:8:12: model[1].aliases[0] is \"a\": must be unique among names and aliases: `model[0].name` (f.toml:2:8) has it already",
            "f.toml:10:8: model[1].worker[0].name is \"w:1\": must be unique among the names of workers, which are host:port where `name` is omitted: `model[0].worker[0].url` (f.toml:5:7) has it already",
        ],
    );
    check_worker(
        "url = 'http://w:1'\n[[model.worker]]\nname = 'other'\nurl = 'http://w:1/'\n",
        &[
            "f.toml:7:7: model[0].worker[1].url is \"http://w:1/\": must stand once in a model: `model[0].worker[0].url` (f.toml:4:7) is the same",
        ],
    );
    check_worker(
        "url = 'http://w:1'\nmodel = 'x'\n[[model.worker]]\nname = 'other'\nmodel = 'y'\nurl = 'http://w:1'\n",
        &[],
    );
}

#[test]
fn tokenizers_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let make = |path: &str, text: &str| {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    make("hub/models--org--main/refs/main", "c2\n");
    make("hub/models--org--main/snapshots/c1/tokenizer.json", "{}");
    make("hub/models--org--main/snapshots/c2/tokenizer.json", "{}");
    make("hub/models--org--loose/snapshots/c1/tokenizer.json", "{}");
    make("hub/models--org--none/snapshots/c1/config.json", "{}");
    make("plain/config.json", "{}");
    let root = dir.path().display().to_string();
    let hub = dir.path().join("hub");
    let found = |variables: &[(&str, &str)], repository: &str| {
        variables.iter().copied().collect::<Environment>().cached_tokenizer(repository)
    };
    let home = [("HF_HOME", &*root)];
    assert_eq!(found(&home, "org/main"), Some(hub.join("models--org--main/snapshots/c2")));
    assert_eq!(found(&home, "org/loose"), Some(hub.join("models--org--loose/snapshots/c1")));
    let cache = hub.display().to_string();
    assert!(found(&[("HF_HUB_CACHE", &cache), ("HF_HOME", "/nowhere")], "org/loose").is_some());
    assert_eq!(found(&[], "org/main"), None);
    for absent in ["org/none", "org/unknown", "", "/", "org/", "../x", "a/b/c", "org/..", "org/ma in"] {
        assert_eq!(found(&home, absent), None, "{absent:?}");
    }

    let check = |tokenizer: &str, remedy: &str| {
        let text = format!("[[model]]\nname = 'm'\ntokenizer = '{tokenizer}'\n[[model.worker]]\nurl = 'http://w:1'\n");
        check_with(&reader(home), &text, &[&format!("f.toml:3:13: model[0].tokenizer is \"{tokenizer}\": {remedy}")]);
    };
    check(&format!("{root}/absent"), "must be a directory that exists, or hf:org/name");
    check(&format!("{root}/plain"), "must be a directory that holds tokenizer.json");
    check(&format!("{root}/plain/config.json"), "must be a directory that exists, or hf:org/name");
    check(
        "hf:org/none",
        "must be hf:org/name of a repository in the local cache with its tokenizer.json: fetch it with `hf download org/name`, or write the path of a directory",
    );
}
