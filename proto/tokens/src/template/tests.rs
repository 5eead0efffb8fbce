use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn template(source: &str) -> ChatTemplate {
    let special = [("bos_token".to_owned(), "<s>".to_owned())];
    ChatTemplate::new(source, SpecialTokens(special.into())).unwrap()
}

fn render(source: &str, messages: &Json, change: impl Fn(&mut Chat<'_>)) -> Result<String, Error> {
    let messages = messages.to_string();
    let mut chat = Chat::new(messages.as_bytes(), SystemTime::UNIX_EPOCH + Duration::from_secs(1_749_988_800));
    chat.add_generation_prompt = false;
    change(&mut chat);
    template(source).render(&chat)
}

#[track_caller]
fn check(source: &str, expect: &str) {
    let messages = json!([{"role": "user", "content": "hi"}]);
    assert_eq!(render(source, &messages, |_| ()).as_deref(), Ok(expect), "{source}");
}

const CHATML: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>{% endif %}";

#[test]
fn blocks_are_trimmed_and_variables_are_those_of_transformers() {
    check("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb");
    check("a\r\nb\rc\n", "a\nb\nc");
    check("{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents is none }}", "<s>TrueTrue");
    check("{{ strftime_now('%d %b %Y') }}", "15 Jun 2025");
    check("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi");
    check(
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "013",
    );
    check("{{ messages[0]['content'] | upper ~ messages|length }}{{ messages[::-1][0].role }}", "HI1user");
}

#[test]
fn a_template_refuses_in_its_own_words_also_from_within_a_macro() {
    let words = Err(Error::Refused("no such role: user".to_owned()));
    let refusal = "{{ raise_exception('no such role: ' + messages[0].role) }}";
    let messages = json!([{"role": "user"}]);
    assert_eq!(render(refusal, &messages, |_| ()), words);
    assert_eq!(render(&format!("{{% macro m() %}}{refusal}{{% endmacro %}}{{{{ m() }}}}"), &messages, |_| ()), words);
}

#[test]
fn what_python_raises_on_is_refused() {
    let messages = json!([{"role": "user", "content": null}]);
    for source in [
        "{% for a in messages[0].content %}{% endfor %}",
        "{{ 'a' + messages[0].content }}",
        "{{ 'a' + missing }}",
        "{{ missing.attribute }}",
        "{{ 'a' in messages[0].content }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now('%Q') }}",
        "{{ messages[0].content|length }}",
        "{{ unknown() }}",
    ] {
        assert!(matches!(render(source, &messages, |_| ()), Err(Error::Render(_))), "{source}");
    }
}

#[test]
fn what_is_no_template_is_refused_when_it_is_compiled() {
    for source in ["{% for %}", "{{", "{% if x %}", "{{ x | nofilter( }}"] {
        assert!(matches!(ChatTemplate::new(source, SpecialTokens::default()), Err(Error::Render(_))), "{source}");
    }
}

#[test]
fn rendering_ends() {
    let bounded = |source: &str| {
        let mut template = template(source);
        assert_eq!(template.environment.fuel(), Some(FUEL));
        template.environment.set_fuel(Some(50_000)); // the bound itself takes too long for a test
        template.render(&Chat::new(b"[]", SystemTime::UNIX_EPOCH))
    };
    assert_eq!(
        bounded("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        Err(Error::TooMuch)
    );
    assert_eq!(bounded("{% set x = 'x' * 1000000 %}{% for a in range(999) %}{{ x }}{% endfor %}"), Err(Error::TooMuch));
    let deep = bounded("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}");
    assert!(matches!(deep, Err(Error::Render(_))), "{deep:?}");
}

#[test]
fn a_final_message_is_continued_where_its_text_ends() {
    let continued = |source: &str, content: Json| {
        let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]);
        render(source, &messages, |chat| chat.continue_final_message = true)
    };
    assert_eq!(continued(CHATML, json!("It is ")).as_deref(), Ok("<|user|>q<|end|>\n<|assistant|>It is "));
    // trimmed by the template: so is what is continued
    let trimming = CHATML.replace("m.content", "m.content|trim");
    assert_eq!(continued(&trimming, json!("It is ")).as_deref(), Ok("<|user|>q<|end|>\n<|assistant|>It is"));
    let parts = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}</s>{% endfor %}";
    let messages = json!([{"role": "assistant", "content": [{"text": "a"}, {"text": "b"}, {"image": 1}]}]);
    assert_eq!(render(parts, &messages, |chat| chat.continue_final_message = true).as_deref(), Ok("ab"));
}

#[test]
fn a_final_message_that_cannot_be_continued_is_refused() {
    let field = |result: Result<String, Error>| match result {
        Err(Error::Field { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let continued = |source: &str, messages: Json| render(source, &messages, |chat| chat.continue_final_message = true);
    for (source, messages) in [
        (CHATML, json!([])),
        (CHATML, json!([{"role": "assistant"}])),
        (CHATML, json!([{"role": "assistant", "content": null}])),
        (CHATML, json!([{"role": "assistant", "content": 3}])),
        (CHATML, json!([{"role": "assistant", "content": [{"image": 1}]}])),
        ("{{ messages[0].role }}", json!([{"role": "assistant", "content": "a"}])),
        ("{{ messages[0].role }} has content", json!([{"role": "assistant", "content": "a"}])),
    ] {
        assert_eq!(field(continued(source, messages.clone())), "continue_final_message", "{source} {messages}");
    }
    let both = render(CHATML, &json!([{"role": "assistant", "content": "a"}]), |chat| {
        chat.continue_final_message = true;
        chat.add_generation_prompt = true;
    });
    assert_eq!(field(both), "continue_final_message");
}

#[test]
fn further_variables_come_from_the_request_but_not_the_conversation_itself() {
    let given = |kwargs: &str, effort: Option<&str>| {
        let chat = Chat {
            kwargs: Some(kwargs.as_bytes()),
            reasoning_effort: effort,
            ..Chat::new(b"[]", SystemTime::UNIX_EPOCH)
        };
        template("{{ a }}{{ reasoning_effort }}{{ add_generation_prompt }}").render(&chat)
    };
    assert_eq!(given("null", None).as_deref(), Ok("True"));
    assert_eq!(given(r#"{"a": [1], "add_generation_prompt": false}"#, None).as_deref(), Ok("[1]True"));
    assert_eq!(given(r#"{"reasoning_effort": "low"}"#, Some("high")).as_deref(), Ok("highTrue"));
    for name in ["messages", "chat_template", "tokenize"] {
        let refused = given(&format!(r#"{{"{name}": 1}}"#), None);
        assert!(matches!(&refused, Err(Error::Field { field, .. }) if field.ends_with(name)), "{refused:?}");
    }
}

#[test]
fn where_the_engine_itself_fails_the_conversation_is_refused() {
    check("{{ messages[1:][::-1] }}{{ messages[5:9:-1] }}{{ ''[::-1] }}", "[][]");
    let gave_up = Err(Error::Render("the template engine gave up".to_owned()));
    assert_eq!(render("{{ 5 is divisibleby 0 }}", &json!([]), |_| ()), gave_up);
}

fn odd_json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        "(user|assistant|system|tool|<think>|</think>|\\PC{0,6})".prop_map(Json::from),
    ];
    leaf.prop_recursive(4, 40, 5, |inner| {
        let keys =
            "(role|content|tool_calls|function|arguments|name|type|text|items|properties|id|reasoning_content|x)";
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
            proptest::collection::vec((keys, inner), 0..6)
                .prop_map(|entries| Json::Object(entries.into_iter().collect())),
        ]
    })
}

/// Walks into everything that templates commonly touch.
const GREEDY: &str = "{% for m in messages %}{{ m }}{{ m.role }}{{ m['content'] }}{{ m|tojson(indent=2) }}\
    {% if m.content is string %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}\
    {% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments|items|list }}{% endfor %}\
    {% if m.content is mapping %}{% for k, v in m.content.items() %}{{ k }}{{ v|string|trim }}{% endfor %}{% endif %}\
    {% endfor %}";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_conversation_makes_a_template_panic(
        messages in proptest::collection::vec(odd_json(), 0..5),
        tools in odd_json(),
        kwargs in odd_json(),
        continue_final_message: bool,
    ) {
        let [messages, tools, kwargs] = [Json::from(messages), tools, kwargs].map(|json| json.to_string());
        for source in [CHATML, GREEDY] {
            let template = template(source);
            let chat = Chat {
                tools: Some(tools.as_bytes()),
                kwargs: Some(kwargs.as_bytes()),
                continue_final_message,
                ..Chat::new(messages.as_bytes(), SystemTime::UNIX_EPOCH)
            };
            let _ = template.render(&chat);
            if let Ok(mut parsed) = Parsed::new(&chat) {
                for format in [ContentFormat::Text, ContentFormat::Parts] {
                    let _ = parsed.normalize(format);
                }
                let _ = template.render_parsed(parsed);
            }
        }
    }

    #[test]
    fn no_source_makes_the_compiler_panic(source in "(\\{%|%\\}|\\{\\{|\\}\\}|\\{#|for|in|if|x|set|=|'|\"|\\(|\\)|\\[|:|-|\\||generation|raw|endraw| |\\PC){0,24}") {
        let _ = ChatTemplate::new(&source, SpecialTokens::default());
    }
}
