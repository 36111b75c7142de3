"""Words around an option in English, German, Spanish, French and Chinese, in lower case."""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Nouns and verbs that announce an answer.
NOUNS = _set(
    """answer solution antwort lösung respuesta solución elijo réponse reponse choisis wait
    correction 答案 选 选择 選 選擇"""
)
VERBS = _set("choose pick select say with wähle")
SPEAKERS = _set("i we i'll i'd will would go going ich")
OPTION = _set(
    """option choice statement letter opción alternativa letra lettre l'option buchstabe aussage
    选项 選項 项 項"""
)
CORRECT = _set(
    """correct right best true richtig richtige korrekt korrekte correcta correcto correcte bonne
    exacte 正确 正確"""
)
INCORRECT = _set(
    """wrong incorrect false other another impossible eliminated ruled falsch falsche incorrecta
    incorrectas falsa falsas fausse fausses mauvaise incorrecte 错误 錯誤 错"""
)
COPULA = _set(
    """is isn't be seems = : ist lautet wäre es sería est n'est c'est serait 是 为 為 应"""
) | {"\n"}
NEGATION = _set(
    """not no never neither nor cannot can't isn't won't nicht kein keine pas n'est ni 不 不是 非"""
)
_FILLERS = _set(
    """the to this that question problem above here would should must might may could can will
    final most definitely clearly probably likely certainly surely indeed therefore thus so hence
    simply just actually then given by either both only it it's und die der das also somit daher
    wohl la el las los por tanto donc le les my 应该 應該 该 就 的 应 應 故"""
)
# What may stand between the announcing word and the option, and between an option and "correct".
LEAD = COPULA | NEGATION | OPTION | CORRECT | _FILLERS
CONFIRMING = COPULA | _FILLERS | OPTION | {")", "]"}
# After these comes the option that is meant instead of a denied one.
BUT = _set("but rather sondern sino mais instead it's 而是")
# Joins of two options. After those of OR the second is always meant; the others may lead to a
# remark on it.
OR = _set(
    """or maybe perhaps possibly alternatively through to oder vielleicht o ou bis / | – — ~ 或
    或者"""
)
AND = _set("and well und y e et also even both either , ; . & 、 ( [ 和 与 與 及 以") | {"\n"}
OR_AND = OR | AND
LISTING = OR | _set("and , ; &")
CLOSING = _set(") ] \" ' ” ’ » :")
# These end an answer, or begin a remark on it.
END = CLOSING | _set(". , ; ! 。 ， ； ！ - –") | {"", "\n"}
REMARK = _set(
    """because since as which for due with given but not rather instead from by based in weil da
    denn porque ya pues car parce puisque ( ["""
)
# May stand between two options that are joined; may follow an option's text, which has to be whole.
JOIN = OR | AND | CLOSING | OPTION | _set("the la answer it could might may can be but as")
WHOLE = END | REMARK | OR | AND
BECAUSE = _set("because since weil porque car")
SENTENCE_END = _set(". ! ? 。") | {"\n"}
CLAUSE_END = SENTENCE_END | _set(", ; : ，") | {""}
# A number or a letter before these is part of a formula.
FORMULA = _set("= ^ + * % < > \\ ?")
PLURAL = _set("are both 都 sind son sont depending seem")
CONDITIONS = _set(
    """if whether suppose assume assuming doubt neither nor not wenn ob weder noch nicht si ni
    如果"""
)
DOUBTED = _set("think believe say mean sure certain know")
ANNOUNCING = NOUNS | VERBS | OPTION | CORRECT
EITHER = _set("or and oder und o y ou et / 和 或 与")
DENIAL = INCORRECT | NEGATION
# One of these before "option A" sets it aside.
SET_ASIDE = DENIAL | CONDITIONS | _set("eliminate exclude except out unlike than")
