//! One batch in MessagePack, field by field as vLLM writes it (0.32.0, `distributed/kv_events.py`; the array form as
//! releases before had it). Fields that have their default at the end of an event are left out.

use std::time::{SystemTime, UNIX_EPOCH};

use forebay_simulator::BlockEvent;

use super::{
    KvEventForm,
    contents::{Block, Contents},
};

/// One event to write.
#[derive(Debug)]
pub(super) enum Told<'a> {
    /// Blocks that follow each other.
    Stored {
        blocks: Vec<Block<'a>>,
        block_tokens: u32,
    },
    Removed(u64),
    Cleared,
}

/// A step's changes as vLLM words them: one event for each run of new blocks, one for each block that goes.
pub(super) fn told<'a>(events: &[BlockEvent], contents: &'a Contents, block_tokens: u32) -> Vec<Told<'a>> {
    let mut told: Vec<Told<'a>> = Vec::new();
    for event in events {
        match event {
            BlockEvent::Removed(hash) => told.push(Told::Removed(*hash)),
            BlockEvent::Stored(hash) => {
                // Unknown when its sequence was aborted in the step that stored it: it cannot be used again either,
                // since its last tokens are nobody's prompt.
                let Some(block) = contents.block(*hash, block_tokens) else { continue };
                match told.last_mut() {
                    Some(Told::Stored { blocks, .. })
                        if block.parent.is_some() && blocks.last().map(|last| last.hash) == block.parent =>
                    {
                        blocks.push(block);
                    }
                    _ => told.push(Told::Stored { blocks: vec![block], block_tokens }),
                }
            }
        }
    }
    told
}

pub(super) fn write(told: &[Told<'_>], form: KvEventForm) -> Vec<u8> {
    let mut out = Writer { bytes: Vec::new(), form };
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    out.array(3);
    out.bytes.push(0xcb);
    out.bytes.extend(time.to_be_bytes());
    out.array(told.len());
    for event in told {
        out.event(event);
    }
    out.unsigned(0);
    out.bytes
}

struct Writer {
    bytes: Vec<u8>,
    form: KvEventForm,
}

impl Writer {
    fn event(&mut self, event: &Told<'_>) {
        match event {
            Told::Stored { blocks, block_tokens } => self.stored(blocks, *block_tokens),
            Told::Removed(hash) => {
                self.begin("BlockRemoved", 3);
                self.field("block_hashes");
                self.array(1);
                self.hash(*hash);
                self.field("medium");
                self.text("GPU");
                self.field("group_idx");
                self.unsigned(0);
            }
            Told::Cleared => self.begin("AllBlocksCleared", 0),
        }
    }

    fn stored(&mut self, blocks: &[Block<'_>], block_tokens: u32) {
        self.begin("BlockStored", 10);
        self.field("block_hashes");
        self.array(blocks.len());
        blocks.iter().for_each(|block| self.hash(block.hash));
        self.field("parent_block_hash");
        match blocks.first().and_then(|block| block.parent) {
            Some(parent) => self.hash(parent),
            None => self.nil(),
        }
        self.field("token_ids");
        self.array(blocks.iter().map(|block| block.ids.len()).sum());
        blocks.iter().flat_map(|block| block.ids).for_each(|id| self.unsigned(u64::from(*id)));
        self.field("block_size");
        self.unsigned(block_tokens.into());
        let adapter = blocks.first().and_then(|block| block.adapter);
        self.field("lora_id");
        match adapter {
            Some(_) => self.unsigned(1),
            None => self.nil(),
        }
        self.field("medium");
        self.text("GPU");
        self.field("lora_name");
        match adapter {
            Some(adapter) => self.text(adapter),
            None => self.nil(),
        }
        self.field("extra_keys");
        self.array(blocks.len());
        for block in blocks {
            let texts = [block.adapter, block.salt].into_iter().flatten();
            match texts.clone().count() {
                0 => self.nil(),
                count => self.array(count),
            }
            texts.for_each(|text| self.text(text));
        }
        self.field("group_idx");
        self.unsigned(0);
        self.field("kv_cache_spec_kind");
        self.text("full_attention");
    }

    fn begin(&mut self, tag: &str, fields: usize) {
        match self.form {
            KvEventForm::Maps => {
                self.length(0x80, 16, [0xde, 0xde, 0xdf], fields + 1);
                self.text("type");
            }
            KvEventForm::Arrays => self.array(fields + 1),
        }
        self.text(tag);
    }

    /// The name of the next field, where fields have names.
    fn field(&mut self, name: &str) {
        if self.form == KvEventForm::Maps {
            self.text(name);
        }
    }

    fn hash(&mut self, hash: u64) {
        match self.form {
            // SHA-256 has 32 bytes.
            KvEventForm::Maps => {
                self.bytes.extend([0xc4, 32]);
                self.bytes.extend([0x5a; 24]);
                self.bytes.extend(hash.to_be_bytes());
            }
            KvEventForm::Arrays => self.unsigned(hash),
        }
    }

    fn array(&mut self, length: usize) {
        self.length(0x90, 16, [0xdc, 0xdc, 0xdd], length);
    }

    fn text(&mut self, text: &str) {
        self.length(0xa0, 32, [0xd9, 0xda, 0xdb], text.len());
        self.bytes.extend(text.as_bytes());
    }

    fn nil(&mut self) {
        self.bytes.push(0xc0);
    }

    fn unsigned(&mut self, number: u64) {
        match number {
            0..=0x7f => self.bytes.push(number as u8),
            0x80..=0xff => self.bytes.extend([0xcc, number as u8]),
            0x100..=0xffff => {
                self.bytes.push(0xcd);
                self.bytes.extend((number as u16).to_be_bytes());
            }
            0x1_0000..=0xffff_ffff => {
                self.bytes.push(0xce);
                self.bytes.extend((number as u32).to_be_bytes());
            }
            _ => {
                self.bytes.push(0xcf);
                self.bytes.extend(number.to_be_bytes());
            }
        }
    }

    /// A length: below `short_below` in the marker itself, else behind the marker for 1, 2 or 4 bytes. Containers have
    /// no marker for 1 byte and name that for 2 instead.
    fn length(&mut self, short: u8, short_below: usize, [one, two, four]: [u8; 3], length: usize) {
        match length {
            _ if length < short_below => self.bytes.push(short | length as u8),
            ..=0xff if one != two => self.bytes.extend([one, length as u8]),
            ..=0xffff => {
                self.bytes.push(two);
                self.bytes.extend((length as u16).to_be_bytes());
            }
            _ => {
                self.bytes.push(four);
                self.bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
            }
        }
    }
}
